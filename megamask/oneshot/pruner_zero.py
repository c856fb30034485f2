"""Pruner-Zero: a metric found by genetic programming (Dong et al., "Pruner-Zero: Evolving Symbolic
Pruning Metric from scratch for Large Language Models", ICML 2024).

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import Statistics
from megamask.sparsity.pattern import Pattern


class PrunerZero(Criterion):
    """The mask of the n largest |W_ij * W_ij| * (G_ij - min G) / (max G - min G) of every group:
    the tree of the paper's code, ``mul(abs(mul(W, W)), mms(G))``.

    G_ij is the norm over the samples of the gradient of the dense model's loss at the weight, and
    its least and largest value are those of a Hugging Face linear. Where they are equal, the factor
    is 1. Ties go to the earlier position.
    """

    needs_gradients = True
    mixes_rows = True

    def prune(
        self, weight_OI: torch.Tensor, stats: Statistics, pattern: Pattern, settings: PruneSection
    ) -> Pruned:
        """Choose the mask.

        Raises:
            ConfigError: m does not divide in_features, or the gradients are not finite.
        """
        pattern.groups(weight_OI.shape[1])
        gradient_OI = stats.of_gradients.norm_OI
        above_OI = gradient_OI - gradient_OI.min()
        largest = above_OI.max()
        # Gradients that are all alike say nothing, as those of an expert that no token reached.
        scaled_OI = torch.where(largest > 0, above_OI / largest, 1.0)
        score_OI = weight_OI.detach().float().square() * scaled_OI
        return Pruned(pattern.best(score_OI), score_OI)
