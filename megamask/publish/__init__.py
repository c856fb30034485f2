"""A mask or a masked model for the Hugging Face Hub, with a card of what was measured."""
