"""Rotary frequencies of a checkpoint, scaled ones and several sets of them included."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megamask.weights.architecture import Architecture
from megamask.weights.family import Rope


class RotarySets(RotaryEmbedding):
    """The angles of all rotary embeddings of a model, side by side on the last axis of one tensor.

    A layer takes its own columns of the tensor (``columns``). A tuple of tensors would not pass
    through Megatron's recomputation of layers, which saves tensors alone.

    Args:
        frequencies: inverse frequencies of each embedding, (rotated dimensions / 2,) fp32.
    """

    def __init__(self, frequencies: Sequence[torch.Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.frequencies = list(frequencies)
        self.cp_group = None

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles (S, 1, 1, sum of rotated dimensions); each set holds its angles twice."""
        parts = []
        for inverse in self.frequencies:
            places = torch.arange(max_seq_len, device=inverse.device, dtype=inverse.dtype) + offset
            angles = torch.outer(places, inverse)
            parts += [angles, angles]
        return torch.cat(parts, dim=-1)[:, None, None, :]


def columns(arch: Architecture, rope: int) -> slice:
    """The columns of an embedding in the tensor of ``RotarySets``."""
    widths = [rotated(arch, one) for one in arch.ropes]
    first = sum(widths[:rope])
    return slice(first, first + widths[rope])


def rotated(arch: Architecture, rope: Rope) -> int:
    """Number of dimensions of a head that an embedding rotates."""
    return int(arch.head_dim * rope.share)


def inverse_frequencies(arch: Architecture, rope: Rope) -> torch.Tensor:
    """The inverse frequencies (rotated dimensions / 2,) fp32, scaled as ``rope.scaling`` says."""
    width = rotated(arch, rope)
    exponent = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain = 1.0 / (rope.theta**exponent)
    scaling = rope.scaling
    if scaling is None:
        return plain
    factor = scaling["factor"]
    return plain / factor if scaling["type"] == "linear" else _llama3(plain, scaling)


def _llama3(plain: torch.Tensor, scaling: dict[str, float]) -> torch.Tensor:
    """The scaling of Llama 3.1 ("llama3" in transformers).

    Low frequencies are divided by the factor, high frequencies are kept, and frequencies between
    both are a blend.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    # The number of periods within the original context.
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - blend) + plain * blend
