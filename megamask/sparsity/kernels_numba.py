"""Fused sampling of the relaxed categorical on CPUs: one pass over logits and weights, noise made in registers.

Needs numba only, no C compiler. A kernel runs on one thread without the GIL; fused_cpu.py gives each thread a slice of the rows. (Of
numba's own thread layers, OpenMP kills a process that forks, as checkpoint writers do, and the work queue scaled poorly.) A row is worked
on in tiles whose scratch stays in the first-level cache.

The score of a candidate is taken in base 2, (kappa log2(e) pi - log2(-log2 u)) / tau: the softmax over candidates is that of Eq. 6, because
the constant by which the two Gumbels differ cancels.

Shapes: O rows, G groups per row, C candidates, M group size, I = G * M. Storage travels as raw bits: uint16 for bf16, uint32 for fp32.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from megamask.sparsity.numba_math import (
    U32,
    U64,
    F,
    bits_of,
    exp2,
    fill_words,
    float_of,
    flush_denormals,
    fma,
    log2,
    log2_short,
    prefetch,
    restore,
    round_bf16,
    uniform,
)

TILE = 256  # groups
_HIGH = U32(0xFFFF0000)
LOG2_E = F(1.4426950408889634)


@njit(inline="always")
def load(line, i):  # type: ignore[no-untyped-def]
    """Element ``i`` of a line of raw bits as fp32."""
    return float_of(U32(line[i]) << U32(16)) if line.itemsize == 2 else float_of(U32(line[i]))


@njit(inline="always")
def store(line, i, value):  # type: ignore[no-untyped-def]
    """Write ``value`` at ``i`` of a line of raw bits."""
    line[i] = round_bf16(value) >> U32(16) if line.itemsize == 2 else bits_of(value)


@njit(inline="always")
def _probabilities(y, top, word, logits, start, groups, first, key, kappa, inverse_tau):  # type: ignore[no-untyped-def]
    """Fill ``y`` (C, G) with the relaxed sample of ``groups`` groups from ``start`` of a row, which have global ids from ``first``."""
    perturbed(y, word, logits, start, groups, first, key, kappa, inverse_tau)
    _softmax(y, top, groups, logits.shape[0])


@njit(inline="always")
def perturbed(y, word, logits, start, groups, first, key, kappa, inverse_tau):  # type: ignore[no-untyped-def]
    """Fill ``y`` (L, G) with the scores in base 2, one for each of L logits a group; ``word`` is scratch."""
    fill_words(word, first, groups, key)
    scale = kappa * LOG2_E
    for c in range(logits.shape[0]):
        line = logits[c, start : start + groups]
        for g in range(groups):
            y[c, g] = fma(scale, load(line, g), -log2_short(-log2(uniform(word[c, g])))) * inverse_tau


@njit(inline="always")
def _softmax(y, top, groups, candidates):  # type: ignore[no-untyped-def]
    """2^y over its sum along the first axis of (C, G), in place; ``top`` (G,) is scratch."""
    for g in range(groups):
        top[g] = y[0, g]
    for c in range(1, candidates):
        for g in range(groups):
            top[g] = max(top[g], y[c, g])
    for c in range(candidates):
        for g in range(groups):
            y[c, g] = exp2(y[c, g] - top[g])
    for g in range(groups):
        top[g] = y[0, g]
    for c in range(1, candidates):
        for g in range(groups):
            top[g] += y[c, g]
    for g in range(groups):
        top[g] = F(1) / top[g]
    for c in range(candidates):
        for g in range(groups):
            y[c, g] *= top[g]


@njit(inline="always")
def _mix_masks(mask, y, kept, groups, hard):  # type: ignore[no-untyped-def]
    """mask (M, G) = y (C, G) through the candidate table (MaskLLM, Eq. 7); hard takes the largest y alone."""
    candidates, members = kept.shape
    for j in range(mask.shape[0]):
        for g in range(groups):
            mask[j, g] = F(0)
    if hard:
        for g in range(groups):
            winner = 0
            for c in range(1, candidates):
                if y[c, g] > y[winner, g]:
                    winner = c
            for k in range(members):
                mask[kept[winner, k], g] = F(1)
    else:
        for c in range(candidates):
            for k in range(members):
                j = kept[c, k]
                for g in range(groups):
                    mask[j, g] += y[c, g]


@njit(inline="always")
def apply_mask(out, square, weight, mask, groups):  # type: ignore[no-untyped-def]
    """out = weight * mask for lines of ``groups`` groups; square (G,) = the sum of squares of each group."""
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
def _apply_pairs(out, square, weight, mask, groups):  # type: ignore[no-untyped-def]
    """The same for four bf16 in two 32-bit words, which vectorises."""
    for g in range(groups):
        low, high = weight[2 * g], weight[2 * g + 1]
        a, b = float_of(low << U32(16)) * mask[0, g], float_of(low & _HIGH) * mask[1, g]
        c, d = float_of(high << U32(16)) * mask[2, g], float_of(high & _HIGH) * mask[3, g]
        out[2 * g] = (round_bf16(b) & _HIGH) | (round_bf16(a) >> U32(16))
        out[2 * g + 1] = (round_bf16(d) & _HIGH) | (round_bf16(c) >> U32(16))
        square[g] = fma(d, d, fma(c, c, fma(b, b, a * a)))


@njit(inline="always")
def gradient_at_mask(mask, grad, weight, groups, norm_coef):  # type: ignore[no-untyped-def]
    """mask (M, G) becomes dM = dW * W - 2 norm_coef W^2 * M."""
    m = mask.shape[0]
    coef = F(2) * norm_coef
    if weight.itemsize == 2 and grad.itemsize == 2 and m == 4:
        pairs, dpairs = weight.view(np.uint32), grad.view(np.uint32)
        for g in range(groups):
            for half in range(2):
                w, d = pairs[2 * g + half], dpairs[2 * g + half]
                mask[2 * half, g] = _slope(float_of(d << U32(16)), float_of(w << U32(16)), mask[2 * half, g], coef)
                mask[2 * half + 1, g] = _slope(float_of(d & _HIGH), float_of(w & _HIGH), mask[2 * half + 1, g], coef)
        return
    if weight.itemsize == 2 and m == 4:
        pairs, dpairs64 = weight.view(np.uint32), grad.view(np.uint64)
        for g in range(groups):
            for half in range(2):
                w, d64 = pairs[2 * g + half], dpairs64[2 * g + half]
                mask[2 * half, g] = _slope(float_of(U32(d64)), float_of(w << U32(16)), mask[2 * half, g], coef)
                mask[2 * half + 1, g] = _slope(float_of(U32(d64 >> U64(32))), float_of(w & _HIGH), mask[2 * half + 1, g], coef)
        return
    for g in range(groups):
        for j in range(m):
            mask[j, g] = _slope(load(grad, g * m + j), load(weight, g * m + j), mask[j, g], coef)


@njit(inline="always")
def _slope(d, w, mask, coef):  # type: ignore[no-untyped-def]
    return w * fma(-coef * w, mask, d)


@njit(inline="always")
def _scores(score, mean, dmask, y, kept, groups):  # type: ignore[no-untyped-def]
    """score (C, G) = dM through the candidate table, mean (G,) = sum_c y score."""
    candidates, members = kept.shape
    for g in range(groups):
        mean[g] = F(0)
    for c in range(candidates):
        for g in range(groups):
            score[c, g] = dmask[kept[c, 0], g]
        for k in range(1, members):
            j = kept[c, k]
            for g in range(groups):
                score[c, g] += dmask[j, g]
        for g in range(groups):
            mean[g] += y[c, g] * score[c, g]


@njit(inline="always")
def _winners(winner, top, total, logits, start, groups, kappa):  # type: ignore[no-untyped-def]
    """winner (G,) uint8 = argmax over candidates; total (G,) = the largest probability. Draws no noise; ``top`` is scratch."""
    candidates = logits.shape[0]
    line = logits[0, start : start + groups]
    for g in range(groups):
        top[g], winner[g], total[g] = load(line, g), 0, F(0)
    for c in range(1, candidates):
        line, number = logits[c, start : start + groups], np.uint8(c)
        for g in range(groups):
            value = load(line, g)
            winner[g] = number if value > top[g] else winner[g]
            top[g] = max(top[g], value)
    scale = kappa * LOG2_E
    for c in range(candidates):
        line = logits[c, start : start + groups]
        for g in range(groups):
            total[g] += exp2((load(line, g) - top[g]) * scale)
    for g in range(groups):
        total[g] = F(1) / total[g]


@njit(inline="always")
def ask_for(logits, weight, m, row, start, groups):  # type: ignore[no-untyped-def]
    """Fetch the tile after this one of ``groups`` groups, while the noise is made."""
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
def sum_line(line, groups):  # type: ignore[no-untyped-def]
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


@njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, not an exception: the step refuses it by name
def forward(out, sums, winner, logits, weight, kept, m, place, key, kappa, inverse_tau, hard):  # type: ignore[no-untyped-def]
    """out (O, I) = weight * sampled mask; sums (O, 2) fp64 = its squares and the largest probabilities per row.

    winner (O, G) uint8 is filled, and the second sum, unless winner is empty.
    place = (global id of the first row, global id of the first column group, groups in a whole row).
    """
    rows, candidates, groups = logits.shape
    tile = min(groups, TILE)
    y, top, square = np.empty((candidates, tile), np.float32), np.empty(tile, np.float32), np.empty(tile, np.float32)
    word, mask = np.empty((4 * ((candidates + 3) // 4), tile), np.uint32), np.empty((m, tile), np.float32)
    before = flush_denormals()
    for o in range(rows):
        first = U64(place[0] + o) * U64(place[2]) + U64(place[1])
        norm, largest = 0.0, 0.0
        for start in range(0, groups, tile):
            n = min(tile, groups - start)
            ask_for(logits, weight, m, o, start, n)
            _probabilities(y, top, word, logits[o], start, n, first + U64(start), key, kappa, inverse_tau)
            _mix_masks(mask, y, kept, n, hard)
            apply_mask(out[o, start * m : (start + n) * m], square, weight[o, start * m : (start + n) * m], mask, n)
            norm += sum_line(square, n)
            if winner.size:
                _winners(winner[o, start : start + n], top, square, logits[o], start, n, kappa)
                largest += sum_line(square, n)
        sums[o, 0], sums[o, 1] = norm, largest
    restore(before)


@njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, not an exception: the step refuses it by name
def backward(into, is_sum, grad, logits, weight, kept, m, place, key, kappa, inverse_tau, hard, norm_coef):  # type: ignore[no-untyped-def]
    """into (O, C, G) = or += dlogits of grad (O, I), the gradient at W * M, minus norm_coef * |W * M|^2; the noise is drawn again."""
    rows, candidates, groups = logits.shape
    tile = min(groups, TILE)
    y, top, mean = np.empty((candidates, tile), np.float32), np.empty(tile, np.float32), np.empty(tile, np.float32)
    word, mask = np.empty((4 * ((candidates + 3) // 4), tile), np.uint32), np.empty((m, tile), np.float32)
    score = np.empty((candidates, tile), np.float32)
    slope = kappa * inverse_tau
    before = flush_denormals()
    for o in range(rows):
        first = U64(place[0] + o) * U64(place[2]) + U64(place[1])
        for start in range(0, groups, tile):
            n = min(tile, groups - start)
            ask_for(logits, weight, m, o, start, n)
            ask_for(into, grad, m, o, start, n)
            _probabilities(y, top, word, logits[o], start, n, first + U64(start), key, kappa, inverse_tau)
            _mix_masks(mask, y, kept, n, hard)
            gradient_at_mask(mask, grad[o, start * m : (start + n) * m], weight[o, start * m : (start + n) * m], n, norm_coef)
            _scores(score, mean, mask, y, kept, n)
            for c in range(candidates):
                line = into[o, c, start : start + n]
                if is_sum:
                    for g in range(n):
                        store(line, g, load(line, g) + slope * y[c, g] * (score[c, g] - mean[g]))
                else:
                    for g in range(n):
                        store(line, g, slope * y[c, g] * (score[c, g] - mean[g]))
    restore(before)


@njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, not an exception: the step refuses it by name
def survey(winner, largest, logits, kappa):  # type: ignore[no-untyped-def]
    """winner (O, G) uint8 = argmax over candidates; largest (O,) fp64 = row sums of the largest probability, no noise."""
    rows, _, groups = logits.shape
    top, total = np.empty(groups, np.float32), np.empty(groups, np.float32)
    before = flush_denormals()
    for o in range(rows):
        _winners(winner[o], top, total, logits[o], 0, groups, kappa)
        largest[o] = sum_line(total, groups)
    restore(before)
