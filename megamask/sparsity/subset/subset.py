"""The k-subset distribution: one logit per unit, a weight or a pair. The probability that a unit is
kept is exact (SIMPLE, arXiv 2210.01941).

Shapes: O out_features, I in_features, G groups per row, M group size.
"""

from __future__ import annotations

from typing import Any

import torch

from megamask.errors import ConfigError
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset.match_entropy import noise_scale, position_bonus

MAX_POSITIONS = 32  # of a group: the bits of a hard code


class Subset(Distribution):
    """A group has one logit per unit (L = M / unit); bit j of a hard code says that unit j is
    kept.
    """

    name = "subset"
    reference = "megamask.sparsity.subset.k_subset"
    numba = "megamask.sparsity.subset.k_subset_numba"
    triton = "megamask.sparsity.subset.k_subset_triton"

    def logits_per_group(self, pattern: Pattern) -> int:
        """The number of units of a group.

        Raises:
            ConfigError: the number is above ``MAX_POSITIONS``.
        """
        if pattern.units.m > MAX_POSITIONS:
            limit = f"learn.method=subset takes M up to {MAX_POSITIONS}"
            fix = f"Choose a pattern with M <= {MAX_POSITIONS}."
            raise ConfigError("pattern", str(pattern), limit, fix)
        return pattern.units.m

    def code_dtype(self, pattern: Pattern) -> torch.dtype:
        """The smallest integer with a bit for every unit."""
        return pattern.bits_dtype()

    def mask_of(self, hard_codes_OG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The mask, (O, I) bool, that the bits of the codes spell out."""
        # In the dtype of the codes, where the highest bit may be the sign.
        bits_M = (1 << torch.arange(pattern.units.m, device=hard_codes_OG.device)).to(
            hard_codes_OG.dtype
        )
        return pattern.expand((hard_codes_OG.unsqueeze(-1) & bits_M).ne(0).flatten(-2))

    def index_of(self, hard_codes: torch.Tensor, pattern: Pattern) -> Any:
        """Candidate index of the kept units."""
        return pattern.index_of_bits(hard_codes)

    def hard_mask(self, logits_OLG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The mask, (O, I) bool, of the N largest logits; ties go to the earlier position."""
        return pattern.best(self.scores(logits_OLG, pattern))

    def scores(self, logits_OLG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The logits, (O, I) fp32; the logit of a unit for each of its weights."""
        return pattern.expand(logits_OLG.float().transpose(1, 2).flatten(1))

    def prior_bonus(
        self,
        prior_OI: torch.Tensor,
        pattern: Pattern,
        strength: float,
        std: float,
        spread: float = 0.0,
    ) -> torch.Tensor:
        """std * bonus at the kept units, less the mean, (O, L, G); ``match_entropy.py`` has the
        bonus. The degree of a unit is the mean of its weights' degrees.
        """
        units = pattern.units
        kept_OU = pattern.sum_of_units(prior_OI.float()) / pattern.unit
        kept = kept_OU.unflatten(1, (-1, units.m)).transpose(1, 2)
        mean = kept.mean(1, keepdim=True) if prior_OI.is_floating_point() else pattern.density
        return (kept - mean) * (std * position_bonus(units, strength, spread))

    def noise_unit(self, pattern: Pattern) -> float:
        """The standard deviation of a position's logit over that of a candidate's."""
        return noise_scale(pattern.units)

    def reference_bytes(self, pattern: Pattern) -> float:
        """As much as the categorical takes, and two tables of K + 1 fp32 coefficients, K = min(N,
        M - N) in units.
        """
        n, m = pattern.units.n, pattern.units.m
        return 32 + 2 * 4 * (min(n, m - n) + 1)


SUBSET = Subset()
