"""A mask as a bit per weight, which any device unpacks in a few passes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BYTE = 8  # bits
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def pack_bits(mask_OI: Tensor) -> Tensor:
    """The bits of a bool mask in row-major order, (ceil(O * I / 8),) uint8 on the mask's device.
    The first place is the lowest bit of the first byte.
    """
    packed = np.packbits(mask_OI.contiguous().cpu().numpy(), bitorder="little")
    return torch.from_numpy(packed).to(mask_OI.device)


def masked_by_bits(weight_OI: Tensor, bits: Tensor) -> Tensor:
    """The weight with +0.0 where a mask of ``pack_bits`` does not keep it, in new memory.

    A table has eight integers for each byte, all ones where a weight is kept. The bits of the
    weights and of these integers are joined by "and": an eighth of the time of ``masked_fill`` on a
    CPU, and +0.0 has no bit set.
    """
    dtype = INTEGERS[weight_OI.element_size()]
    places = torch.arange(BYTE, device=bits.device)
    byte = torch.arange(2**BYTE, device=bits.device)[:, None]
    table = -((byte >> places) & 1).to(dtype)
    kept = table.index_select(0, bits.int()).flatten()[: weight_OI.numel()]
    return kept.view(weight_OI.shape).bitwise_and_(as_integers(weight_OI)).view(weight_OI.dtype)


def as_integers(weight: Tensor) -> Tensor:
    """The bits of floating-point numbers, as integers of their size in the same memory."""
    return weight.view(INTEGERS[weight.element_size()])
