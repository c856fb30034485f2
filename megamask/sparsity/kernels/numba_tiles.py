"""What the fused CPU kernels of all distributions share: tiles of groups, raw bits of bf16 and
fp32, scores, masking and its gradient.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import njit

from megamask.sparsity.kernels.numba_math import (
    U32,
    U64,
    F,
    bits_of,
    fill_words,
    float_of,
    fma,
    log2,
    log2_short,
    prefetch,
    round_bf16,
    uniform,
)

TILE = 256  # groups


_HIGH = U32(0xFFFF0000)


LOG2_E = F(1.4426950408889634)


@njit(inline="always")
def load(line, i):
    """Element ``i`` of a line of raw bits as fp32."""
    return float_of(U32(line[i]) << U32(16)) if line.itemsize == 2 else float_of(U32(line[i]))


@njit(inline="always")
def store(line, i, value):
    """Write ``value`` at ``i`` of a line of raw bits."""
    line[i] = round_bf16(value) >> U32(16) if line.itemsize == 2 else bits_of(value)


@njit(inline="always")
def perturbed(y, word, logits, start, groups, first, key, scales):
    """Fill ``y`` (L, G) with the scores in base 2, one for each of L logits a group; ``word`` is
    scratch, scales = (kappa, 1 / tau, noise). At noise 0 no word and no logarithm is computed.
    """
    kappa, inverse_tau, noise = scales
    scale = kappa * LOG2_E
    if noise == F(0):
        for c in range(logits.shape[0]):
            line = logits[c, start : start + groups]
            for g in range(groups):
                y[c, g] = scale * load(line, g) * inverse_tau
        return
    fill_words(word, first, groups, key)
    for c in range(logits.shape[0]):
        line = logits[c, start : start + groups]
        for g in range(groups):
            gumbel = -noise * log2_short(-log2(uniform(word[c, g])))
            y[c, g] = fma(scale, load(line, g), gumbel) * inverse_tau


@njit(inline="always")
def apply_mask(out, square, weight, mask, groups):
    """out = weight * mask for lines of ``groups`` groups; square (G,) = the sum of squares of each
    group.
    """
    m = mask.shape[0]
    if weight.itemsize == 2 and m == 4:
        _apply_pairs(out.view(np.uint32), square, weight.view(np.uint32), mask, groups)
        return
    for g in range(groups):
        total = F(0)
        for j in range(m):
            masked = load(weight, g * m + j) * mask[j, g]
            store(out, g * m + j, masked)
            total = fma(masked, masked, total)
        square[g] = total


@njit(inline="always")
def _apply_pairs(out, square, weight, mask, groups):
    """The same for four bf16 in two 32-bit words, which vectorises."""
    for g in range(groups):
        low, high = weight[2 * g], weight[2 * g + 1]
        a, b = float_of(low << U32(16)) * mask[0, g], float_of(low & _HIGH) * mask[1, g]
        c, d = float_of(high << U32(16)) * mask[2, g], float_of(high & _HIGH) * mask[3, g]
        out[2 * g] = (round_bf16(b) & _HIGH) | (round_bf16(a) >> U32(16))
        out[2 * g + 1] = (round_bf16(d) & _HIGH) | (round_bf16(c) >> U32(16))
        square[g] = fma(d, d, fma(c, c, fma(b, b, a * a)))


@njit(inline="always")
def gradient_at_mask(mask, grad, weight, groups, norm_coef):
    """mask (M, G) becomes dM = dW * W - 2 norm_coef W^2 * M."""
    m = mask.shape[0]
    coef = F(2) * norm_coef
    if weight.itemsize == 2 and grad.itemsize == 2 and m == 4:
        pairs, dpairs = weight.view(np.uint32), grad.view(np.uint32)
        for g in range(groups):
            for half in range(2):
                w, d = pairs[2 * g + half], dpairs[2 * g + half]
                mask[2 * half, g] = _slope(
                    float_of(d << U32(16)), float_of(w << U32(16)), mask[2 * half, g], coef
                )
                mask[2 * half + 1, g] = _slope(
                    float_of(d & _HIGH), float_of(w & _HIGH), mask[2 * half + 1, g], coef
                )
        return
    if weight.itemsize == 2 and m == 4:
        pairs, dpairs64 = weight.view(np.uint32), grad.view(np.uint64)
        for g in range(groups):
            for half in range(2):
                w, d64 = pairs[2 * g + half], dpairs64[2 * g + half]
                mask[2 * half, g] = _slope(
                    float_of(U32(d64)), float_of(w << U32(16)), mask[2 * half, g], coef
                )
                mask[2 * half + 1, g] = _slope(
                    float_of(U32(d64 >> U64(32))), float_of(w & _HIGH), mask[2 * half + 1, g], coef
                )
        return
    for g in range(groups):
        for j in range(m):
            mask[j, g] = _slope(load(grad, g * m + j), load(weight, g * m + j), mask[j, g], coef)


@njit(inline="always")
def _slope(d, w, mask, coef):
    return w * fma(-coef * w, mask, d)


@njit(inline="always")
def ask_for(logits, weight, m, row, start, groups):
    """Prefetch the next tile (``groups`` groups from the end of this tile on), while the noise of
    this tile is made.
    """
    rows, candidates, whole = logits.shape
    start += groups
    if start >= whole:
        row, start = row + 1, 0
    if row < rows:
        count = min(groups, whole - start)
        for c in range(candidates):
            prefetch(logits, (row * candidates + c) * whole + start, count)
        prefetch(weight, (row * whole + start) * m, count * m)


@njit(inline="always")
def sum_line(line, groups):
    """fp64 sum in eight interleaved parts, which vectorises."""
    parts = np.zeros(8)
    whole = groups // 8 * 8
    for start in range(0, whole, 8):
        for lane in range(8):
            parts[lane] += line[start + lane]
    total = parts.sum()
    for g in range(whole, groups):
        total += line[g]
    return total
