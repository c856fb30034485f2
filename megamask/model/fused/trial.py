"""The fused kernels against the separate passes, on a few tokens, before a model is built.

A package that is installed may still not work: Triton needs a compiler and Python's headers at its
first launch. The bits must be the same, so a rank whose kernels fail may take the separate passes
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megamask.model.fused.rotation import rotate
from megamask.model.fused.swiglu import swiglu

TOKENS = 16
WHOLE = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
Pass = Callable[[torch.Tensor], torch.Tensor]


def activation_problem(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with SwiGLU of ``width`` columns here; empty if nothing is."""

    def plain(both: torch.Tensor) -> torch.Tensor:
        gate, up = torch.chunk(both, 2, dim=-1)
        product: torch.Tensor = F.silu(gate) * (up + 0.0)
        return product

    return _problem(swiglu, plain, _random(TOKENS, 1, 2 * width).to(device, dtype))


def rotation_problem(
    heads: Collection[int], width: int, dtype: torch.dtype, device: torch.device
) -> str:
    """What is wrong with the rotation of each number of heads of ``width`` dimensions here; empty
    if nothing is.
    """
    half = torch.outer(torch.arange(TOKENS), torch.logspace(0, -4, width // 2))
    angles = torch.cat([half, half], -1)[:, None, None].to(device)
    for count in dict.fromkeys(heads):
        problem = _problem(
            lambda t: rotate(t, angles),
            lambda t: _apply_rotary_pos_emb_bshd(t, angles),
            _random(TOKENS, 1, count, width).to(device, dtype),
        )
        if problem:
            return problem
    return ""


def _problem(fused: Pass, plain: Pass, values: torch.Tensor) -> str:
    try:
        found = _results(fused, values)
        if values.is_cuda:
            torch.cuda.synchronize(values.device)  # the errors of kernels come late
    except Exception as error:  # a compiler's or a driver's
        lines = str(error).strip().splitlines() or ["no message"]
        return f"{type(error).__name__}: {lines[0][:200]}"
    names = ("output", "gradient")
    for name, mine, theirs in zip(names, found, _results(plain, values), strict=True):
        kind = WHOLE[values.dtype]
        off = int((mine.contiguous().view(kind) != theirs.contiguous().view(kind)).sum())
        if off:
            return f"{off} of {mine.numel()} numbers of the {name} have other bits"
    return ""


def _results(way: Pass, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the gradient at the input."""
    with torch.enable_grad():
        x = values.detach().requires_grad_()
        out = way(x)
        (gradient,) = torch.autograd.grad(out, x, out.detach().flip(0))
    return out.detach(), gradient


def _random(*shape: int) -> torch.Tensor:
    """Values from N(0, 4)."""
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
