"""Wanda: weight times activation norm (Sun et al., "A Simple and Effective Pruning Approach for
Large Language Models", 2023).

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import Statistics
from megamask.sparsity.pattern import Pattern


class Wanda(Criterion):
    """The mask of the n largest |W_ij| * |X_j|_2 of every group (Eq. 1 of the paper).

    Ties go to the earlier position. The norm is taken as a root mean square over the tokens: the
    number of tokens scales every score by the same factor, so the mask is the same.
    """

    needs_stats = True

    def prune(
        self,
        weight_OI: torch.Tensor,
        stats: Statistics,
        pattern: Pattern,
        settings: PruneSection,
    ) -> Pruned:
        """Choose the mask.

        Raises:
            ConfigError: m does not divide in_features, there are no tokens, or the inputs are not
                finite.
        """
        pattern.groups(weight_OI.shape[1])
        score_OI = weight_OI.detach().float().abs() * stats.of_inputs.mean_square_I.sqrt()
        return Pruned(pattern.best(score_OI), score_OI)
