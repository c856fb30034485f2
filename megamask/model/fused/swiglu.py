"""silu(gate) * up in one pass forward and one backward, with the bits of PyTorch's passes.

The backward pass makes silu(gate) again: the input alone is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megamask.model.fused import launcher

BLOCK, WARPS = 1024, 4  # columns of a program; 8 of each half for a thread


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        both: (..., 2 F), gate before up. Another dtype than bf16 and fp32, or another device than
            CUDA, takes PyTorch's passes.

    Returns:
        (..., F).
    """
    if launcher.takes(both) and both.numel():  # an expert may get no tokens
        product: torch.Tensor = _SwiGlu.apply(both)  # type: ignore[no-untyped-call]
        return product
    gate, up = torch.chunk(both, 2, dim=-1)
    return F.silu(gate) * (up + 0.0)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        from megamask.model.fused import swiglu_triton

        both = both.contiguous()
        ctx.save_for_backward(both)
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        launcher.launch(
            swiglu_triton.forward, _programs(out), WARPS, out, out, both, width, BLOCK=BLOCK
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        from megamask.model.fused import swiglu_triton

        (both,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(both)
        programs, width = _programs(grad), grad.shape[-1]
        launcher.launch(
            swiglu_triton.backward, programs, WARPS, out, out, grad, both, width, BLOCK=BLOCK
        )
        return out


def _programs(product: torch.Tensor) -> int:
    width = product.shape[-1]
    return product.numel() // width * -(-width // BLOCK)
