"""Wanda: weight times activation norm (Sun et al., "A Simple and Effective Pruning Approach for
Large Language Models", 2023).
"""

from __future__ import annotations

import torch

from megamask.oneshot.pruned import Pruned
from megamask.oneshot.stats import InputStats
from megamask.sparsity.pattern import Pattern


def wanda(weight_OI: torch.Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
    """Mask (O, I) of the n largest |W_ij| * |X_j|_2 of every group (Eq. 1); ties go to the earlier
    position.

    The norm is taken as a root mean square: the number of tokens scales every score alike.

    Raises:
        ConfigError: m does not divide in_features; no tokens, or inputs that are not finite.
    """
    pattern.groups(weight_OI.shape[1])
    score_OI = weight_OI.detach().float().abs() * stats.mean_square_I.sqrt()
    return Pruned(pattern.best(score_OI))
