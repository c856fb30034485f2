"""The rotation of queries or keys by their angles, and its gradient, which turns back.

Every result of the separate passes of Megatron is rounded to the dtype here too. A program has all
heads of a token, ROWS at a time, so that it computes the token's sines once.

Shapes: S sequence, B batch, H heads, D width of a head; HALF = D / 2.
"""

from __future__ import annotations

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors
import triton
import triton.language as tl

from megamask.model.fused.exact_math import cos, sin
from megamask.sparsity.kernels.triton_tiles import rounded


@triton.jit
def _turned(a, c, b, s, kind: tl.constexpr):
    """a c + b s in fp32."""
    kept = rounded(a * c, kind).to(tl.float32)
    return rounded(kept + rounded(b * s, kind).to(tl.float32), kind).to(tl.float32)


@triton.jit(do_not_specialize=["batch"])
def rotate(
    out,
    source,
    angles,
    batch,
    place_stride,
    batch_stride,
    head_stride,
    angle_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """(S, B, H, D), contiguous, from (S, B, H, D) with strides and (S, D) angles, whose halves are
    equal.
    """
    kind: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    place, sample = token // batch, token % batch
    d = tl.arange(0, COLUMNS)
    angle = tl.load(angles + place * angle_stride + d, mask=d < HALF, other=0.0)
    c = rounded(cos(angle), kind).to(tl.float32)[None, :]
    s = rounded(sin(angle), kind).to(tl.float32)[None, :]
    # Triton's minus is a difference from +0, which makes +0 of both zeros.
    back = -1.0 * s
    if BACKWARD:
        s, back = back, s
    source += place * place_stride + sample * batch_stride
    out += token * HEADS * HALF * 2
    for first in range(0, HEADS, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        inside = (head < HEADS) & (d[None, :] < HALF)
        start = source + head * head_stride + d[None, :]
        low = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
        new_low, new_high = _turned(low, c, high, back, kind), _turned(high, c, low, s, kind)
        if BACKWARD:  # autograd adds the gradient of the dimensions that do not turn, zero
            new_low, new_high = new_low + 0.0, new_high + 0.0
        goal = out + head * HALF * 2 + d[None, :]
        tl.store(goal, new_low.to(kind), mask=inside)
        tl.store(goal + HALF, new_high.to(kind), mask=inside)
