"""Magnitude pruning: keep the largest |W| of every group. It needs no data.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import Statistics
from megamask.sparsity.pattern import Pattern


class Magnitude(Criterion):
    """The mask of the n largest |W| of every group; ties go to the earlier position."""

    def prune(
        self,
        weight_OI: torch.Tensor,
        stats: Statistics,
        pattern: Pattern,
        settings: PruneSection,
    ) -> Pruned:
        """Choose the mask; ``stats`` are not read.

        Raises:
            ConfigError: m does not divide in_features.
        """
        pattern.groups(weight_OI.shape[1])
        score_OI = weight_OI.detach().float().abs()  # pairs are summed
        return Pruned(pattern.best(score_OI), score_OI)
