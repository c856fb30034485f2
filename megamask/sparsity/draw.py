"""What one sampling of one layer needs to know besides its logits and weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megamask.sparsity.distributions import Distribution, code_dtype, logits_per_group
from megamask.sparsity.noise import NoiseKey, uniform, words
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement


@dataclass(frozen=True)
class Draw:
    """The sampling of one micro-batch.

    Attributes:
        key: names the noise.
        kappa: scale of the logits.
        tau: temperature.
        hard: one-hot masks, with the gradient of the soft ones (straight-through).
        norm_coef: the gradient of ``- norm_coef * sum |W * M|^2`` is added in the backward pass. It
            is already divided by the number of micro-batches, as the LM loss is.
        watch: also look at the logits without noise: winner of every group, largest probabilities.
        fresh: the gradient replaces what its buffer holds instead of being added: the first draw of
            a step, which spares clearing it.
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
        sums: (2,) fp64: sum |W * M|^2, and the sum over groups of the largest probability of a
            candidate, exp(kappa * its logit) over all of them (0 unless watched).
        winner: the candidate with the largest logit of every group, (O, G), in the code of
            ``Site.mask_of``; (0,) unless watched.
    """

    masked: torch.Tensor
    sums: torch.Tensor
    hard_codes: torch.Tensor


@dataclass(frozen=True)
class Site:
    """A masked weight: its pattern, its place in the whole layer, and the distribution of its
    masks.

    ``categorical`` has one logit per candidate, ``linear`` one per member of a group (a candidate's
    is the sum of its members').

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
    def code_dtype(self) -> torch.dtype:
        """Of winners."""
        return code_dtype(self.pattern, self.distribution)

    def mask_of(self, winner_OG: torch.Tensor) -> torch.Tensor:
        """The mask, (O, I) bool, of winners: candidate indices (categorical), or bit j = member j
        is kept (linear).
        """
        if self.distribution == "categorical":
            return self.pattern.mask_of(winner_OG)
        position = torch.arange(self.pattern.m, device=winner_OG.device, dtype=torch.int32)
        return (winner_OG.to(torch.int32).unsqueeze(-1) >> position & 1).bool().flatten(-2)


def gumbel_noise(
    site: Site, draw: Draw, groups: int, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Gumbel noise g = -log(-log u), (O, C, G) (Eq. 5), one for every logit."""
    word = words(
        draw.key, site.placement.group_ids(groups, device), site.logits_per_group
    )  # (C, O, G)
    return -torch.log(-torch.log(uniform(word).to(dtype))).transpose(0, 1)


def computing_dtype(mask_logits: torch.Tensor) -> torch.dtype:
    """fp32, or wider if the logits are."""
    return torch.promote_types(mask_logits.dtype, torch.float32)
