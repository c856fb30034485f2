"""silu(gate) * up and its gradient, one pass each.

Every result of the separate passes of PyTorch is rounded to the dtype here too. A program has BLOCK
columns of a row; F is the number of columns of gate or up.
"""

from __future__ import annotations

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors
import triton
import triton.language as tl

from megamask.model.fused.exact_math import exp
from megamask.sparsity.kernels.triton_tiles import rounded


@triton.jit
def _place(F, BLOCK: tl.constexpr):
    """Row (int64), columns (BLOCK,) and which of them exist."""
    blocks = (F + BLOCK - 1) // BLOCK
    index = tl.program_id(0)
    column = index % blocks * BLOCK + tl.arange(0, BLOCK)
    return (index // blocks).to(tl.int64), column, column < F


@triton.jit
def _halves(both, row, column, inside, F):
    """Gate and up in fp32. PyTorch's pass adds an offset of zero to up, which makes +0 of -0."""
    start = both + row * 2 * F + column
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + F, mask=inside, other=0.0).to(tl.float32)
    return gate, up + 0.0


@triton.jit
def forward(out, both, F, BLOCK: tl.constexpr):
    """(rows, F) <- (rows, 2 F)."""
    kind: tl.constexpr = out.dtype.element_ty
    row, column, inside = _place(F, BLOCK)
    gate, up = _halves(both, row, column, inside, F)
    silu = rounded(tl.div_rn(gate, 1.0 + exp(-gate)), kind).to(tl.float32)
    tl.store(out + row * F + column, rounded(silu * up, kind), mask=inside)


@triton.jit
def backward(out, grad, both, F, BLOCK: tl.constexpr):
    """The gradient at both halves, (rows, 2 F), of that at the product, (rows, F)."""
    kind: tl.constexpr = out.dtype.element_ty
    row, column, inside = _place(F, BLOCK)
    gate, up = _halves(both, row, column, inside, F)
    dy = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 + exp(-gate)
    silu = rounded(tl.div_rn(gate, share), kind).to(tl.float32)
    sigmoid = tl.div_rn(1.0, share)
    dsilu = rounded(dy * up, kind).to(tl.float32)
    # CUDA's compiler makes one operation of this product and sum in PyTorch's kernel.
    slope = tl.fma(gate, 1.0 - sigmoid, 1.0)
    start = out + row * 2 * F + column
    tl.store(start, rounded(dsilu * sigmoid * slope, kind), mask=inside)
    tl.store(start + F, rounded(dy * silu, kind), mask=inside)
