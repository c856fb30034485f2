"""Whether a mask is one."""

from __future__ import annotations

import torch

from megamask.sparsity.pattern import Pattern


def is_valid(pattern: Pattern, mask_OI: torch.Tensor) -> bool:
    """Whether every group keeps exactly n, and whole units (0/1 or bool mask, groups along the last
    axis).
    """
    if mask_OI.shape[-1] % pattern.m:
        return False
    as_int = mask_OI.to(torch.int32)
    if not torch.equal(as_int.to(mask_OI.dtype), mask_OI) or bool(
        ((as_int != 0) & (as_int != 1)).any()
    ):
        return False
    of_units = as_int.unflatten(-1, (-1, pattern.unit)).sum(-1)
    if bool(((of_units != 0) & (of_units != pattern.unit)).any()):
        return False
    return bool((as_int.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all())
