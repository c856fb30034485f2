"""Fused sampling of the relaxed categorical on CPUs: one pass over logits and weights, noise made
in registers.

Needs numba only, no C compiler. A kernel runs on one thread without the GIL; numba_host.py gives
each thread a slice of the rows. (Of numba's own thread layers, OpenMP kills a process that forks,
as checkpoint writers do, and the work queue scaled poorly.) A row is worked on in tiles whose
scratch stays in the first-level cache.

The score of a candidate is taken in base 2, (kappa log2(e) pi - noise log2(-log2 u)) / tau: the
softmax over candidates is that of Eq. 6, because the constant by which the two Gumbels differ
cancels. ``scales`` of the kernels is (kappa, 1 / tau, noise).

Shapes: O rows, G groups per row, C candidates, M group size, I = G * M. Storage travels as raw
bits: uint16 for bf16, uint32 for fp32.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from megamask.sparsity.kernels.numba_math import (
    U64,
    F,
    exp2,
    flush_denormals,
    restore,
)
from megamask.sparsity.kernels.numba_tiles import (
    LOG2_E,
    TILE,
    apply_mask,
    ask_for,
    gradient_at_mask,
    load,
    perturbed,
    store,
    sum_line,
)
from megamask.sparsity.pattern import Pattern


@lru_cache
def shape_arguments(pattern: Pattern) -> tuple[np.ndarray[Any, Any], int]:
    """``kept`` and ``m`` of the kernels: the kept positions of every candidate, (C, N), and M."""
    return np.array(pattern.kept_positions, dtype=np.int64), pattern.m


@njit(inline="always")
def _probabilities(y, top, word, logits, start, groups, first, key, scales):
    """Fill ``y`` (C, G) with the relaxed sample of ``groups`` groups from ``start`` of a row, which
    have global ids from ``first``.
    """
    perturbed(y, word, logits, start, groups, first, key, scales)
    _softmax(y, top, groups, logits.shape[0])


@njit(inline="always")
def _softmax(y, top, groups, candidates):
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
def _mix_masks(mask, y, kept, groups, hard):
    """mask (M, G) = y (C, G) through the candidate table (MaskLLM, Eq. 7); hard takes the largest y
    alone.
    """
    candidates, positions = kept.shape
    for j in range(mask.shape[0]):
        for g in range(groups):
            mask[j, g] = F(0)
    if hard:
        for g in range(groups):
            best = 0
            for c in range(1, candidates):
                if y[c, g] > y[best, g]:
                    best = c
            for k in range(positions):
                mask[kept[best, k], g] = F(1)
    else:
        for c in range(candidates):
            for k in range(positions):
                j = kept[c, k]
                for g in range(groups):
                    mask[j, g] += y[c, g]


@njit(inline="always")
def _scores(score, mean, dmask, y, kept, groups):
    """score (C, G) = dM through the candidate table, mean (G,) = sum_c y score."""
    candidates, positions = kept.shape
    for g in range(groups):
        mean[g] = F(0)
    for c in range(candidates):
        for g in range(groups):
            score[c, g] = dmask[kept[c, 0], g]
        for k in range(1, positions):
            j = kept[c, k]
            for g in range(groups):
                score[c, g] += dmask[j, g]
        for g in range(groups):
            mean[g] += y[c, g] * score[c, g]


@njit(inline="always")
def _hard_codes(hard_codes, top, total, logits, start, groups, kappa):
    """hard_codes (G,) uint8 = argmax over candidates; total (G,) = the largest probability.

    Draws no noise; ``top`` is scratch.
    """
    candidates = logits.shape[0]
    line = logits[0, start : start + groups]
    for g in range(groups):
        top[g], hard_codes[g], total[g] = load(line, g), 0, F(0)
    for c in range(1, candidates):
        line, number = logits[c, start : start + groups], np.uint8(c)
        for g in range(groups):
            value = load(line, g)
            hard_codes[g] = number if value > top[g] else hard_codes[g]
            top[g] = max(top[g], value)
    scale = kappa * LOG2_E
    for c in range(candidates):
        line = logits[c, start : start + groups]
        for g in range(groups):
            total[g] += exp2((load(line, g) - top[g]) * scale)
    for g in range(groups):
        total[g] = F(1) / total[g]


# error_model: 0 / 0 is NaN, not an exception; the learning step refuses NaN by name
@njit(nogil=True, cache=True, error_model="numpy")
def forward(out, sums, hard_codes, logits, weight, kept, m, place, key, scales, hard):
    """out (O, I) = weight * sampled mask; sums (O, 2) fp64 = its squares and the largest
    probabilities per row.

    hard_codes (O, G) uint8 is filled, and the second sum, unless hard_codes is empty.
    place = (global id of the first row, global id of the first column group, groups in a whole
    row).
    """
    rows, candidates, groups = logits.shape
    tile = min(groups, TILE)
    y, top, square = (
        np.empty((candidates, tile), np.float32),
        np.empty(tile, np.float32),
        np.empty(tile, np.float32),
    )
    word, mask = (
        np.empty((4 * ((candidates + 3) // 4), tile), np.uint32),
        np.empty((m, tile), np.float32),
    )
    before = flush_denormals()
    for o in range(rows):
        first = U64(place[0] + o) * U64(place[2]) + U64(place[1])
        norm, largest = 0.0, 0.0
        for start in range(0, groups, tile):
            n = min(tile, groups - start)
            # soft or hard mask of the tile
            ask_for(logits, weight, m, o, start, n)
            _probabilities(y, top, word, logits[o], start, n, first + U64(start), key, scales)
            _mix_masks(mask, y, kept, n, hard)
            # W * M and its squares
            apply_mask(
                out[o, start * m : (start + n) * m],
                square,
                weight[o, start * m : (start + n) * m],
                mask,
                n,
            )
            norm += sum_line(square, n)
            # statistics of the logits without noise
            if hard_codes.size:
                _hard_codes(
                    hard_codes[o, start : start + n], top, square, logits[o], start, n, scales[0]
                )
                largest += sum_line(square, n)
        sums[o, 0], sums[o, 1] = norm, largest
    restore(before)


# error_model: 0 / 0 is NaN, not an exception; the learning step refuses NaN by name
@njit(nogil=True, cache=True, error_model="numpy")
def backward(buffer, is_sum, grad, logits, weight, kept, m, place, key, scales, hard, norm_coef):
    """buffer (O, C, G) = or += the gradient at the logits.

    grad (O, I) is the gradient at W * M; the gradient of - norm_coef * |W * M|^2 is added. The
    noise is drawn again.
    """
    rows, candidates, groups = logits.shape
    tile = min(groups, TILE)
    y, top, mean = (
        np.empty((candidates, tile), np.float32),
        np.empty(tile, np.float32),
        np.empty(tile, np.float32),
    )
    word, mask = (
        np.empty((4 * ((candidates + 3) // 4), tile), np.uint32),
        np.empty((m, tile), np.float32),
    )
    score = np.empty((candidates, tile), np.float32)
    slope = scales[0] * scales[1]
    before = flush_denormals()
    for o in range(rows):
        first = U64(place[0] + o) * U64(place[2]) + U64(place[1])
        for start in range(0, groups, tile):
            n = min(tile, groups - start)
            # soft or hard mask of the tile
            ask_for(logits, weight, m, o, start, n)
            ask_for(buffer, grad, m, o, start, n)
            _probabilities(y, top, word, logits[o], start, n, first + U64(start), key, scales)
            _mix_masks(mask, y, kept, n, hard)
            # gradient at the mask, then at the logits through the softmax
            gradient_at_mask(
                mask,
                grad[o, start * m : (start + n) * m],
                weight[o, start * m : (start + n) * m],
                n,
                norm_coef,
            )
            _scores(score, mean, mask, y, kept, n)
            for c in range(candidates):
                line = buffer[o, c, start : start + n]
                if is_sum:
                    for g in range(n):
                        store(line, g, load(line, g) + slope * y[c, g] * (score[c, g] - mean[g]))
                else:
                    for g in range(n):
                        store(line, g, slope * y[c, g] * (score[c, g] - mean[g]))
    restore(before)


# error_model: 0 / 0 is NaN, not an exception; the learning step refuses NaN by name
@njit(nogil=True, cache=True, error_model="numpy")
def mask_statistics(hard_codes, largest, logits, kept, m, kappa):
    """hard_codes (O, G) uint8 = argmax over candidates; largest (O,) fp64 = row sums of the largest
    probability, no noise.
    """
    rows, _, groups = logits.shape
    top, total = np.empty(groups, np.float32), np.empty(groups, np.float32)
    before = flush_denormals()
    for o in range(rows):
        _hard_codes(hard_codes[o], top, total, logits[o], 0, groups, kappa)
        largest[o] = sum_line(total, groups)
    restore(before)
