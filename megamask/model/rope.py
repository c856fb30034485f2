"""Rotary frequencies of a checkpoint, including scaled ones."""

from __future__ import annotations

import math

import torch

from megamask.weights.architecture import Architecture


def inverse_frequencies(arch: Architecture) -> torch.Tensor:
    """(head_dim / 2,) fp32 inverse frequencies; ``linear`` and ``llama3`` scaling as the
    checkpoint's config names them.
    """
    exponent = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
    plain = 1.0 / (arch.rope_theta**exponent)
    scaling = arch.rope_scaling
    if scaling is None:
        return plain
    factor = scaling["factor"]
    return plain / factor if scaling["type"] == "linear" else _llama3(plain, scaling)


def _llama3(plain: torch.Tensor, scaling: dict[str, float]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between
    blended.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = (
        scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    )  # periods within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - blend) + plain * blend
