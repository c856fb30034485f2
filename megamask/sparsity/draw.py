"""What one sampling of one layer needs to know besides its logits and weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from megamask.errors import ConfigError
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.philox import NoiseKey

Distribution = Literal["categorical", "linear"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
MAX_MEMBERS = 32  # of a group under linear: the bits of a winner


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
        fresh: the gradient replaces what its buffer holds instead of being added: the first draw of a step, which spares clearing it.
    """

    key: NoiseKey
    kappa: float
    tau: float
    hard: bool = False
    norm_coef: float = 0.0
    watch: bool = False
    fresh: bool = False


class Sampled(NamedTuple):
    """What one sampling of one layer gives.

    Attributes:
        masked: W * M, (O, I) in the weight's dtype.
        sums: (2,) fp64: sum |W * M|^2, and the sum over groups of the largest probability of a candidate, exp(kappa * its logit) over
            all of them (0 unless watched).
        winner: the candidate with the largest logit of every group, (O, G), in the code of ``Site.mask_of``; (0,) unless watched.
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
    """A masked weight: its pattern, its place in the whole layer, and the distribution of its masks.

    ``categorical`` has one logit per candidate, ``linear`` one per member of a group (a candidate's is the sum of its members').

    Raises:
        ConfigError: more candidates or members than the distribution takes.
    """

    pattern: Pattern
    placement: Placement
    distribution: Distribution = "categorical"

    def __post_init__(self) -> None:
        logits_per_group(self.pattern, self.distribution)

    @property
    def logits_per_group(self) -> int:
        """C or M: the middle axis of mask logits (O, C or M, G)."""
        return logits_per_group(self.pattern, self.distribution)

    @property
    def winner_dtype(self) -> torch.dtype:
        """Of winners."""
        return winner_dtype(self.pattern, self.distribution)

    def mask_of(self, winner_OG: torch.Tensor) -> torch.Tensor:
        """The mask, (O, I) bool, of winners: candidate indices (categorical), or bit j = member j is kept (linear)."""
        if self.distribution == "categorical":
            return self.pattern.mask_of(winner_OG)
        member = torch.arange(self.pattern.m, device=winner_OG.device, dtype=torch.int32)
        return (winner_OG.to(torch.int32).unsqueeze(-1) >> member & 1).bool().flatten(-2)


def logits_per_group(pattern: Pattern, distribution: str) -> int:
    """C or M.

    Raises:
        ConfigError: more candidates or members than the distribution takes.
    """
    if distribution == "categorical":
        return len(pattern.kept_positions)
    if pattern.m > MAX_MEMBERS:
        limit = f"learn.distribution=linear takes M up to {MAX_MEMBERS}"
        raise ConfigError("pattern", str(pattern), limit, f"Choose a pattern with M <= {MAX_MEMBERS}.")
    return pattern.m


def winner_dtype(pattern: Pattern, distribution: str) -> torch.dtype:
    """The smallest integer that holds a candidate index (categorical) or M bits (linear)."""
    if distribution == "categorical" or pattern.m <= 8:
        return torch.uint8
    return torch.int16 if pattern.m <= 16 else torch.int32
