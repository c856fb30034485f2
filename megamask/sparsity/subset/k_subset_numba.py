"""Fused sampling of the k-subset distribution on CPUs: gumbel_softmax_numba.py with the positions
of a group in the place of its candidates.

k_subset.py has the maths, llvm_polynomials.py its polynomials, llvm_positions.py moves weights into
vectors. ``kept`` and ``positions`` are tuples of N and of M: their lengths choose the compiled
kernel. Scores are in base 2, as in gumbel_softmax_numba.py: the constant by which all positions of
a group differ cancels. ``scales`` is (kappa, 1 / tau, noise).

A tile is a part of a row, or several short rows, which lie one after the other in its lines: so few
lanes of the last vector idle.

Shapes: O rows, G groups per row, M group size, I = G * M. Storage travels as raw bits: uint16 for
bf16, uint32 for fp32.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def"

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from megamask.sparsity.kernels.numba_math import (
    U32,
    U64,
    F,
    exp2,
    flush_denormals,
    fma,
    log2,
    log2_short,
    mix,
    prefetch,
    restore,
    uniform,
)
from megamask.sparsity.kernels.numba_tiles import LOG2_E, load, store, sum_line
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset import llvm_polynomials, llvm_positions
from megamask.sparsity.subset.llvm_polynomials import LANES

TILE = 1024  # positions, about: scratch stays in the first-level cache
HALF = LANES // 2  # groups whose words are made at once: their products have 64 bits


@lru_cache
def shape_arguments(pattern: Pattern) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``kept`` and ``positions`` of the kernels: tuples of N and of M, whose lengths count."""
    return tuple(range(pattern.n)), tuple(range(pattern.m))


@njit(inline="always")
def _cut(m, rows, groups):
    """(rows, groups of each) of a tile, and how long its lines are: up to twice as long where rows
    are short.
    """
    width = max(LANES, TILE // m // LANES * LANES)
    count = max(1, min((width + groups - 1) // groups, rows))
    return count, min(width, groups), _whole(count * min(width, groups))


@njit(inline="always")
def _whole(groups):
    """``groups`` rounded up to whole vectors."""
    return (groups + LANES - 1) // LANES * LANES


@njit(inline="always")
def _ask_for(lines, weight, o, start, rows, groups):
    """Prefetch the tile from row ``o`` and group ``start`` on, if there is one, while the noise of
    this tile is made.
    """
    whole_rows, m, whole = lines.shape
    if start >= whole:
        o, start = o + rows, 0
    rows, groups = min(rows, whole_rows - o), min(groups, whole - start)
    for row in range(o, o + rows):
        for j in range(m):
            prefetch(lines, (row * m + j) * whole + start, groups)
    if rows > 0:
        prefetch(weight, (o * whole + start) * m, rows * groups * m)


@njit(inline="always")
def _read(x, logits, o, start, rows, groups):
    """x (M, lanes) = the logits of ``rows`` rows from ``o``, ``groups`` groups of each from
    ``start``.
    """
    for row in range(rows):
        for j in range(x.shape[0]):
            line = logits[o + row, j, start : start + groups]
            part = x[j, row * groups : (row + 1) * groups]
            for g in range(groups):
                part[g] = load(line, g)


@njit(inline="always")
def _draw_words(word, place, o, start, rows, groups, key):
    """word (4 B, lanes): the noise of the groups; place = (global ids of the first row and column
    group, groups in a whole row).

    Each row is written in whole half vectors. Words beyond the end of a row are overwritten by the
    next row, which begins there.
    """
    seed, step, micro_batch, parameter = key
    count = (groups + HALF - 1) // HALF * HALF
    for row in range(rows):
        first = U64(place[0] + o + row) * U64(place[2]) + U64(place[1] + start)
        here = slice(row * groups, row * groups + count)
        for block in range(word.shape[0] // 4):
            a, b = word[4 * block, here], word[4 * block + 1, here]
            c, d = word[4 * block + 2, here], word[4 * block + 3, here]
            for g in range(count):
                group = first + U64(g)
                w0, w1, w2, w3 = mix(
                    group, group >> U64(32), U64(block), parameter, micro_batch, seed, step
                )
                a[g], b[g], c[g], d[g] = U32(w0), U32(w1), U32(w2), U32(w3)


@njit(inline="always")
def _score(x, word, place, o, start, rows, groups, key, scales):
    """x (M, lanes), logits, become scores in base 2; ``word`` is scratch. At noise 0 no word and no
    logarithm is computed.
    """
    kappa, inverse_tau, noise = scales
    scale, lanes = kappa * LOG2_E, _whole(rows * groups)
    if noise == F(0):
        for j in range(x.shape[0]):
            for g in range(lanes):
                x[j, g] = scale * x[j, g] * inverse_tau
        return
    _draw_words(word, place, o, start, rows, groups, key)
    for j in range(x.shape[0]):
        for g in range(lanes):
            gumbel = -noise * log2_short(-log2(uniform(word[j, g])))
            x[j, g] = fma(scale, x[j, g], gumbel) * inverse_tau


@njit(inline="always")
def _prepare(x, middle, kept, positions, lanes):
    """Scores x (M, lanes) become 2^-|x - t| with the sign of x - t; ``middle`` is scratch."""
    for g in range(0, lanes, LANES):
        llvm_polynomials.threshold(kept, positions, middle, x, g)
    for j in range(x.shape[0]):
        for g in range(lanes):
            distance = x[j, g] - middle[g]
            small = exp2(-abs(distance))
            x[j, g] = small if distance > F(0) else -small


@njit(inline="always")
def _sample(mask, x, middle, kept, positions, lanes, hard):
    """mask (M, lanes) of scores x, which are left as ``_prepare`` makes them."""
    if hard:
        for g in range(0, lanes, LANES):
            llvm_polynomials.keep_largest(kept, positions, mask, x, g)
    _prepare(x, middle, kept, positions, lanes)
    if not hard:
        for g in range(0, lanes, LANES):
            llvm_polynomials.marginals(kept, positions, mask, x, g)


@njit(inline="always")
def _apply_mask(out, square, weight, mask, kept, positions, groups):
    """out = weight * mask; square (lanes,) = the sum of squares of each group."""
    m, full = mask.shape[0], groups // LANES * LANES
    for g in range(0, full, LANES):
        llvm_positions.apply_mask(kept, positions, out, square, weight, mask, g)
    for g in range(full, groups):
        square[g] = F(0)
        for j in range(m):
            masked = load(weight, g * m + j) * mask[j, g]
            store(out, g * m + j, masked)
            square[g] = fma(masked, masked, square[g])


@njit(inline="always")
def _gradient_at_mask(mask, grad, weight, coef, kept, positions, groups):
    """mask (M, lanes) becomes dM = W * (dW - coef W * M)."""
    m, full = mask.shape[0], groups // LANES * LANES
    for g in range(0, full, LANES):
        llvm_positions.gradient_at_mask(kept, positions, mask, grad, weight, coef, g)
    for g in range(full, groups):
        for j in range(m):
            w = load(weight, g * m + j)
            mask[j, g] = w * fma(-coef * w, mask[j, g], load(grad, g * m + j))


@njit(inline="always")
def _hard_codes(hard_codes, total, mask, x, kept, positions, kappa):
    """hard_codes (lanes,) = bits of the N largest logits x; total (lanes,) = the probability of
    that set. mask and x are scratch.
    """
    lanes = _whole(len(hard_codes))
    for g in range(0, lanes, LANES):
        llvm_polynomials.keep_largest(kept, positions, mask, x, g)
    for g in range(len(hard_codes)):
        hard_codes[g] = 0
    scale = kappa * LOG2_E
    for j in range(x.shape[0]):
        bit = hard_codes.dtype.type(1 << j)
        for g in range(len(hard_codes)):
            hard_codes[g] |= bit if mask[j, g] > F(0) else hard_codes.dtype.type(0)
        for g in range(lanes):
            x[j, g] *= scale
    _prepare(x, total, kept, positions, lanes)
    for g in range(0, lanes, LANES):
        llvm_polynomials.largest_probability(kept, positions, total, x, g)


# error_model: 0 / 0 is NaN, not an exception; the learning step refuses NaN by name
@njit(nogil=True, cache=True, error_model="numpy")
def forward(out, sums, hard_codes, logits, weight, kept, positions, place, key, scales, hard):
    """out (O, I) = weight * sampled mask; sums (O, 2) fp64 = its squares and the largest
    probabilities per row.

    hard_codes (O, G) is filled, and the second sum, unless hard_codes is empty.
    """
    rows, m, groups = logits.shape
    count, width, lanes = _cut(m, rows, groups)
    x, mask, word = (
        np.zeros((m, lanes), np.float32),
        np.zeros((m, lanes), np.float32),
        np.zeros((_words(m), lanes + HALF), np.uint32),
    )
    middle, square = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    flat_weight, flat_out, flat_codes = weight.reshape(-1), out.reshape(-1), hard_codes.reshape(-1)
    sums[:] = 0.0
    before = flush_denormals()
    for o in range(0, rows, count):
        for start in range(0, groups, width):
            r, w = min(count, rows - o), min(width, groups - start)
            _ask_for(logits, weight, o, start + width, count, width)
            # soft or hard mask of the tile
            _read(x, logits, o, start, r, w)
            _score(x, word, place, o, start, r, w, key, scales)
            _sample(mask, x, middle, kept, positions, _whole(r * w), hard)
            # W * M and its squares
            first = o * groups + start
            part = slice(first * m, (first + r * w) * m)
            _apply_mask(flat_out[part], square, flat_weight[part], mask, kept, positions, r * w)
            for row in range(r):
                sums[o + row, 0] += sum_line(square[row * w : (row + 1) * w], w)
            # statistics of the logits without noise
            if hard_codes.size:
                _read(x, logits, o, start, r, w)
                _hard_codes(
                    flat_codes[first : first + r * w], square, mask, x, kept, positions, scales[0]
                )
                for row in range(r):
                    sums[o + row, 1] += sum_line(square[row * w : (row + 1) * w], w)
    restore(before)


@njit(inline="always")
def _words(m):
    return (m + 3) // 4 * 4


@njit(nogil=True, cache=True, error_model="numpy")
def backward(
    buffer, is_sum, grad, logits, weight, kept, positions, place, key, scales, hard, norm_coef
):
    """buffer (O, M, G) = or += the gradient at the logits.

    grad (O, I) is the gradient at W * M; the gradient of - norm_coef * |W * M|^2 is added. The
    noise is drawn again.
    """
    rows, m, groups = logits.shape
    count, width, lanes = _cut(m, rows, groups)
    x, mask, word = (
        np.zeros((m, lanes), np.float32),
        np.zeros((m, lanes), np.float32),
        np.zeros((_words(m), lanes + HALF), np.uint32),
    )
    middle = np.zeros(lanes, np.float32)
    flat_weight, flat_grad = weight.reshape(-1), grad.reshape(-1)
    slope, coef = scales[0] * scales[1], F(2) * norm_coef
    before = flush_denormals()
    for o in range(0, rows, count):
        for start in range(0, groups, width):
            r, w = min(count, rows - o), min(width, groups - start)
            _ask_for(logits, weight, o, start + width, count, width)
            _ask_for(buffer, grad, o, start + width, count, width)
            # soft or hard mask of the tile
            _read(x, logits, o, start, r, w)
            _score(x, word, place, o, start, r, w, key, scales)
            _sample(mask, x, middle, kept, positions, _whole(r * w), hard)
            # gradient at the mask, then at the scores
            part = slice((o * groups + start) * m, (o * groups + start + r * w) * m)
            _gradient_at_mask(
                mask, flat_grad[part], flat_weight[part], coef, kept, positions, r * w
            )
            for g in range(0, _whole(r * w), LANES):
                llvm_polynomials.covariances(kept, positions, mask, x, g)
            _put(buffer, is_sum, mask, slope, o, start, r, w)
    restore(before)


@njit(inline="always")
def _put(buffer, is_sum, found, slope, o, start, rows, groups):
    """buffer (O, M, G) = or += slope * found (M, lanes)."""
    for row in range(rows):
        for j in range(found.shape[0]):
            line = buffer[o + row, j, start : start + groups]
            part = found[j, row * groups : (row + 1) * groups]
            if is_sum:
                for g in range(groups):
                    store(line, g, load(line, g) + slope * part[g])
            else:
                for g in range(groups):
                    store(line, g, slope * part[g])


@njit(nogil=True, cache=True, error_model="numpy")
def mask_statistics(hard_codes, largest, logits, kept, positions, kappa):
    """hard_codes (O, G) = bits of the N largest logits; largest (O,) fp64 = row sums of the
    probability of that set, no noise.
    """
    rows, m, groups = logits.shape
    count, width, lanes = _cut(m, rows, groups)
    x, mask, total = (
        np.zeros((m, lanes), np.float32),
        np.zeros((m, lanes), np.float32),
        np.zeros(lanes, np.float32),
    )
    flat_codes = hard_codes.reshape(-1)
    largest[:] = 0.0
    before = flush_denormals()
    for o in range(0, rows, count):
        for start in range(0, groups, width):
            r, w = min(count, rows - o), min(width, groups - start)
            _read(x, logits, o, start, r, w)
            first = o * groups + start
            _hard_codes(flat_codes[first : first + r * w], total, mask, x, kept, positions, kappa)
            for row in range(r):
                largest[o + row] += sum_line(total[row * w : (row + 1) * w], w)
    restore(before)
