"""Magnitude: keep the largest |W| of every group. Needs no data."""

from __future__ import annotations

import torch

from megamask.oneshot.pruned import Pruned
from megamask.sparsity.pattern import Pattern


def magnitude(weight_OI: torch.Tensor, pattern: Pattern) -> Pruned:
    """Mask (O, I) of the n largest |W| of every group; ties go to the earlier position.

    Raises:
        ConfigError: m does not divide in_features.
    """
    pattern.groups(weight_OI.shape[1])
    return Pruned(pattern.best(weight_OI.detach().abs()))
