"""Perplexity of dense and masked models."""
