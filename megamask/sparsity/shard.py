"""Where a shard of a weight lies in the whole layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowBlock:
    """``rows`` local rows from ``start`` are the global rows from ``global_start``."""

    start: int
    rows: int
    global_start: int


@dataclass(frozen=True)
class Placement:
    """Where a local shard lies in the whole weight, so that every group knows its global id.

    The global id of group (o, g) is ``o * groups_in_row + g`` with the row and group numbers of the
    unsharded layer. A gated fc1 shard holds two row blocks, [gate; up].
    """

    blocks: tuple[RowBlock, ...]
    first_group: int
    groups_in_row: int

    @classmethod
    def whole(cls, out_features: int, groups: int) -> Placement:
        """An unsharded layer."""
        return cls((RowBlock(0, out_features, 0),), 0, groups)

    @classmethod
    def shard(
        cls, local_rows: int, local_groups: int, *, axis: int, rank: int, size: int, stride: int = 1
    ) -> Placement:
        """The shard of ``rank`` of ``size`` along ``axis`` (0 rows, 1 groups); ``stride`` stacked
        parts are split one by one.
        """
        if axis == 1:
            return cls((RowBlock(0, local_rows, 0),), rank * local_groups, size * local_groups)
        part = local_rows // stride
        blocks = tuple(
            RowBlock(s * part, part, s * part * size + rank * part) for s in range(stride)
        )
        return cls(blocks, 0, local_groups)

    def group_ids(self, groups: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Global group ids, (O, G) int64, of this shard."""
        rows = torch.cat(
            [
                torch.arange(b.global_start, b.global_start + b.rows, device=device)
                for b in self.blocks
            ]
        )
        columns = torch.arange(self.first_group, self.first_group + groups, device=device)
        return rows[:, None] * self.groups_in_row + columns
