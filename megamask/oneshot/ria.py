"""RIA, relative importance and activations (Zhang et al., "Plug-and-Play: An Efficient
Post-training Pruning Method for Large Language Models", ICLR 2024).

The channel permutation of the paper is left out here: the verb reorder permutes channels, for every
criterion, where everything that writes them can be permuted too.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import Statistics
from megamask.sparsity.pattern import Pattern

ACTIVATION_POWER = 0.5  # a of the paper, which takes 0.5 for all its models


class RIA(Criterion):
    """The mask of the n largest (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * |X_j|_2^a of
    every group, with a = ``ACTIVATION_POWER``.

    The first sum runs over the column and the second over the row of a Hugging Face linear. Ties go
    to the earlier position. The norm is taken as a root mean square over the tokens: the number of
    tokens scales every score by the same factor, so the mask is the same.
    """

    needs_stats = True
    mixes_rows = True

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
        size_OI = weight_OI.detach().float().abs()
        least = torch.finfo(torch.float32).tiny  # a row or column of zeros has importance 0
        column_sum_I = size_OI.sum(0).clamp_min(least)
        row_sum_O = size_OI.sum(1).clamp_min(least)
        relative_OI = size_OI / column_sum_I + size_OI / row_sum_O[:, None]
        score_OI = relative_OI * stats.of_inputs.mean_square_I.pow(ACTIVATION_POWER / 2)
        return Pruned(pattern.best(score_OI), score_OI)
