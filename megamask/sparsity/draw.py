"""What one sampling of one layer needs to know besides its logits and weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megamask.sparsity.pattern import Pattern
from megamask.sparsity.philox import NoiseKey


@dataclass(frozen=True)
class Draw:
    """The sampling of one micro-batch.

    Attributes:
        key: names the noise.
        kappa: scale of the logits.
        tau: temperature.
        hard: one-hot masks, with the gradient of the soft ones (straight-through).
        norm_coef: the gradient of ``- norm_coef * sum |W * M|^2`` is added in the backward pass. It is already divided
            by the number of micro-batches, as the LM loss is.
        watch: also look at the logits without noise: winner of every group, largest probabilities.
    """

    key: NoiseKey
    kappa: float
    tau: float
    hard: bool = False
    norm_coef: float = 0.0
    watch: bool = False


class Sampled(NamedTuple):
    """What one sampling of one layer gives.

    Attributes:
        masked: W * M, (O, I) in the weight's dtype.
        sums: (2,) fp64: sum |W * M|^2, and the sum over groups of the largest probability softmax(kappa pi) (0 unless watched).
        winner: candidate of the largest logit of every group, (O, G) uint8; (0,) unless watched.
    """

    masked: torch.Tensor
    sums: torch.Tensor
    winner: torch.Tensor


@dataclass(frozen=True)
class RowBlock:
    """``rows`` local rows from ``start`` are the global rows from ``global_start``."""

    start: int
    rows: int
    global_start: int


@dataclass(frozen=True)
class Placement:
    """Where a local shard lies in the whole weight, so that every group knows its global id.

    The global id of group (o, g) is ``o * groups_in_row + g`` with the row and group numbers of the unsharded layer.
    A gated fc1 shard holds two row blocks, [gate; up].
    """

    blocks: tuple[RowBlock, ...]
    first_group: int
    groups_in_row: int

    @classmethod
    def whole(cls, out_features: int, groups: int) -> Placement:
        """An unsharded layer."""
        return cls((RowBlock(0, out_features, 0),), 0, groups)

    @classmethod
    def shard(cls, local_rows: int, local_groups: int, *, axis: int, rank: int, size: int, stride: int = 1) -> Placement:
        """The shard of ``rank`` of ``size`` along ``axis`` (0 rows, 1 groups); ``stride`` stacked parts are split one by one."""
        if axis == 1:
            return cls((RowBlock(0, local_rows, 0),), rank * local_groups, size * local_groups)
        part = local_rows // stride
        blocks = tuple(RowBlock(s * part, part, s * part * size + rank * part) for s in range(stride))
        return cls(blocks, 0, local_groups)

    def group_ids(self, groups: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Global group ids, (O, G) int64, of this shard."""
        rows = torch.cat([torch.arange(b.global_start, b.global_start + b.rows, device=device) for b in self.blocks])
        columns = torch.arange(self.first_group, self.first_group + groups, device=device)
        return rows[:, None] * self.groups_in_row + columns


@dataclass(frozen=True)
class Site:
    """A masked weight: its pattern and its place in the whole layer."""

    pattern: Pattern
    placement: Placement
