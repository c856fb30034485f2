"""What every one-shot criterion returns.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pruned:
    """The outcome for one linear.

    Attributes:
        mask_OI: bool, True = keep, exactly n of every m.
        weight_OI: updated weight in the dtype of the original with +0.0 in pruned places, or None
            when the original stays.
        damp: SparseGPT's damping that was used in the end (more than asked for when the Hessian
            needed it), else None.
    """

    mask_OI: torch.Tensor
    weight_OI: torch.Tensor | None = None
    damp: float | None = None
