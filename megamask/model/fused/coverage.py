"""Which architectures the fused kernels cover, for the model and for the planner."""

from __future__ import annotations

from megamask.weights.architecture import Architecture


def covers_activation(arch: Architecture) -> bool:
    """Whether the feed-forward part has a gated SiLU."""
    return arch.gated and arch.activation == "silu"


def covers_rotation(arch: Architecture) -> bool:
    """Whether there are rotary embeddings, all of which rotate whole heads."""
    return bool(arch.ropes) and all(rope.share == 1 for rope in arch.ropes)
