"""2:4 weights at inference: kernels, their measured speed, and where a model should use them."""
