"""What every one-shot criterion returns, and the check that a weight has not been pruned before.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamask.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Pruned:
    """The outcome for one linear.

    Attributes:
        mask_OI: bool, True = keep, exactly n of every m.
        weight_OI: updated weight in the dtype of the original with +0.0 in pruned places, or None when the original stays.
        damp: SparseGPT's damping that was used in the end (more than asked for when the Hessian needed it), else None.
    """

    mask_OI: torch.Tensor
    weight_OI: torch.Tensor | None = None
    damp: float | None = None


def already_sparse(weight_OI: torch.Tensor, pattern: Pattern) -> bool:
    """Whether every group has at least m - n zeros already, so that choosing what to prune would find nothing to learn.

    Raises:
        ConfigError: m does not divide in_features.
    """
    pattern.groups(weight_OI.shape[-1])
    zeros_OG = (weight_OI == 0).unflatten(-1, (-1, pattern.m)).sum(-1)
    return bool((zeros_OG >= pattern.m - pattern.n).all())
