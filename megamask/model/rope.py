"""Rotary frequencies of a checkpoint, scaled ones and several sets of them included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megamask.weights.architecture import Architecture
from megamask.weights.family import Rope
from megamask.weights.frequencies import scaled_frequencies


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
    """The inverse frequencies of an embedding of a model, (rotated dimensions / 2,) fp32."""
    return scaled_frequencies(rotated(arch, rope), rope)
