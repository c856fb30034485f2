"""GBLM-Pruner: weight times activation norm and gradient norm (Das et al., "Beyond Size: How
Gradients Shape Pruning Decisions in Large Language Models", 2023).

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import Statistics
from megamask.sparsity.pattern import Pattern


class GBLM(Criterion):
    """The mask of the n largest |W_ij| * |X_j|_2 + alpha * |W_ij| * |G_ij|_2 of every group, with
    ``prune.alpha``; ties go to the earlier position.

    G_ij is the gradient of the dense model's loss at the weight, and its norm runs over the
    samples. The norm of an input runs over all tokens, over the root of the number of samples, as
    in the paper's code: a sum of two terms depends on their units. An expert whose inputs are
    unknown goes by its weights alone, even if it has gradients of the dense model, because a norm
    that stands in has no unit in common with them.
    """

    reads = ("alpha",)
    needs_stats = True
    needs_gradients = True

    def prune(
        self, weight_OI: torch.Tensor, stats: Statistics, pattern: Pattern, settings: PruneSection
    ) -> Pruned:
        """Choose the mask.

        Raises:
            ConfigError: m does not divide in_features, there are no tokens, or inputs or gradients
                are not finite.
        """
        pattern.groups(weight_OI.shape[1])
        inputs, gradients = stats.of_inputs, stats.of_gradients
        input_norm_I = (inputs.mean_square_I * (inputs.tokens / gradients.samples)).sqrt()
        size_OI = weight_OI.detach().float().abs()
        alpha = 0.0 if inputs.is_stand_in else settings.alpha
        score_OI = size_OI * (input_norm_I + alpha * gradients.norm_OI)
        return Pruned(pattern.best(score_OI), score_OI)
