"""One general mask, and masks of single domains that start from it or from a one-shot mask."""
