"""The rotation of queries or keys in one pass forward and one backward, with the bits of Megatron's
passes.

Shapes: S sequence, B batch, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from megamask.model.fused import launcher

TILE, WARPS = 512, 2  # elements of each half that a program turns at once; 8 for a thread


def can_rotate(t: torch.Tensor, angles: torch.Tensor) -> bool:
    """Whether ``rotate`` covers these tensors: whole heads of bf16 or fp32 on CUDA, and fp32
    angles.
    """
    shape = (t.shape[0], 1, 1, t.shape[-1])
    return (
        launcher.takes(t)
        and t.dim() == 4
        and angles.shape == shape
        and angles.dtype == torch.float32
    )


def rotate(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """t cos(angles) + (-second half of t, first half) sin(angles).

    Args:
        t: queries or keys, (S, B, H, D), with any strides.
        angles: (S, 1, 1, D) fp32, the same in both halves, as ``RotarySets`` makes them.

    Returns:
        (S, B, H, D), contiguous.
    """
    turned: torch.Tensor = _Rotation.apply(t, angles)  # type: ignore[no-untyped-call]
    return turned


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(angles)
        return _turn(t, angles, backward=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _turn(grad, ctx.saved_tensors[0], backward=True), None


def _turn(t: torch.Tensor, angles: torch.Tensor, backward: bool) -> torch.Tensor:
    from megamask.model.fused import rotation_triton

    if t.stride(-1) != 1:
        t = t.contiguous()
    if angles.stride(-1) != 1:
        angles = angles.contiguous()
    places, batch, heads, width = t.shape
    out = t.new_empty(t.shape)
    columns = 1 << (width // 2 - 1).bit_length()
    launcher.launch(
        rotation_triton.rotate,
        places * batch,
        WARPS,
        out,
        out,
        t,
        angles,
        batch,
        *t.stride()[:3],
        angles.stride(0),
        HEADS=heads,
        HALF=width // 2,
        ROWS=max(TILE // columns, 1),
        COLUMNS=columns,
        BACKWARD=backward,
    )
    return out
