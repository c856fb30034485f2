"""The categorical distribution over candidates (MaskLLM, arXiv 2409.17481): one logit per legal
mask of a group.

Shapes: O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

from typing import Any

import torch

from megamask.sparsity.distribution import Distribution
from megamask.sparsity.pattern import Pattern


class Categorical(Distribution):
    """A group has one logit per candidate (L = C); a hard code is the index of a candidate."""

    name = "categorical"
    reference = "megamask.sparsity.categorical.gumbel_softmax"
    numba: str | None = "megamask.sparsity.categorical.gumbel_softmax_numba"
    triton: str | None = "megamask.sparsity.categorical.gumbel_softmax_triton"

    def logits_per_group(self, pattern: Pattern) -> int:
        """C, the number of candidates.

        Raises:
            ConfigError: there are more than ``pattern.MAX_CANDIDATES``.
        """
        return len(pattern.kept_positions)

    def code_dtype(self, pattern: Pattern) -> torch.dtype:
        """uint8: there are at most 256 candidates."""
        return torch.uint8

    def mask_of(self, hard_codes_OG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The mask, (O, I) bool, of the candidates with these indices."""
        return pattern.mask_of(hard_codes_OG)

    def index_of(self, hard_codes: torch.Tensor, pattern: Pattern) -> Any:
        """The codes themselves."""
        return hard_codes

    def hard_mask(self, logits_OLG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The mask, (O, I) bool, of the candidates with the largest logits, the first of equals."""
        return pattern.mask_of(logits_OLG.float().max(dim=1).indices)

    def scores(self, logits_OLG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The best candidate that keeps the position less the best that does not, (O, I) fp32."""
        logits, keeps_CM = logits_OLG.float(), pattern.candidates(device=logits_OLG.device).bool()
        scores = [
            logits[:, keeps_C].amax(1) - logits[:, ~keeps_C].amax(1) for keeps_C in keeps_CM.t()
        ]
        return torch.stack(scores, dim=2).flatten(1)

    def prior_bonus(
        self,
        prior_OI: torch.Tensor,
        pattern: Pattern,
        strength: float,
        std: float,
        spread: float = 0.0,
    ) -> torch.Tensor:
        """std * sim * alpha, (O, C, G) (MaskLLM, Eq. 10)."""
        return similarity(prior_OI, pattern) * (std * strength)

    def noise_unit(self, pattern: Pattern) -> float:
        """1, because ``learn.sampling.logit_std`` is that of candidates' logits."""
        return 1.0

    def fold_bytes(self, pattern: Pattern) -> float:
        """An int64 index of a candidate for each group."""
        return 8 / pattern.m

    def reference_bytes(self, pattern: Pattern) -> float:
        """32: noise, scores, relaxed index and its gradient, with copies, in fp32."""
        return 32


def similarity(prior_OI: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """sim(M_0, M_c) = M_0 . M_c minus its mean over candidates, (O, C, G) (MaskLLM, Eq. 9; the mean
    is n^2 / m for a mask). Overlaps are counted in units.
    """
    groups = prior_OI.float().unflatten(1, (-1, pattern.m))
    overlap = torch.einsum("ogm,cm->ocg", groups, pattern.candidates(device=prior_OI.device))
    if prior_OI.is_floating_point():
        return (overlap - overlap.mean(1, keepdim=True)) / pattern.unit
    return (overlap - pattern.n * pattern.n / pattern.m) / pattern.unit


CATEGORICAL = Categorical()
