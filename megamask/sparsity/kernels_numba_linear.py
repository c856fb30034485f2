"""Fused sampling of the linear distribution on CPUs: kernels_numba.py with the members of a group in the place of its candidates.

linear_distribution.py has the maths, subset_blocks.py its polynomials. ``kept`` and ``members`` are tuples of N and of M: their lengths
choose the compiled kernel. Scores are in base 2, as in kernels_numba.py: the constant by which all members of a group differ cancels.

Shapes: O rows, G groups per row, M group size, I = G * M. Storage travels as raw bits: uint16 for bf16, uint32 for fp32.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from megamask.sparsity import subset_blocks
from megamask.sparsity.kernels_numba import LOG2_E, TILE, apply_mask, ask_for, gradient_at_mask, load, perturbed, store, sum_line
from megamask.sparsity.numba_math import U64, F, exp2, flush_denormals, restore
from megamask.sparsity.subset_blocks import LANES

assert TILE % LANES == 0


@njit(inline="always")
def _prepare(x, middle, kept, members, groups):  # type: ignore[no-untyped-def]
    """Scores x (M, G) become 2^-|x - t| with the sign of x - t; ``middle`` (G,) is scratch."""
    for g in range(0, groups, LANES):
        subset_blocks.threshold(kept, members, middle, x, g)
    for j in range(x.shape[0]):
        for g in range(groups):
            distance = x[j, g] - middle[g]
            small = exp2(-abs(distance))
            x[j, g] = small if distance > F(0) else -small


@njit(inline="always")
def _sample(mask, x, middle, word, kept, members, logits, start, groups, first, key, kappa, inverse_tau, hard):  # type: ignore[no-untyped-def]
    """mask (M, G) of ``groups`` groups from ``start`` of a row, with global ids from ``first``; x is left as ``_prepare`` makes it."""
    perturbed(x, word, logits, start, groups, first, key, kappa, inverse_tau)
    if hard:
        for g in range(0, groups, LANES):
            subset_blocks.keep_largest(kept, members, mask, x, g)
    _prepare(x, middle, kept, members, groups)
    if not hard:
        for g in range(0, groups, LANES):
            subset_blocks.marginals(kept, members, mask, x, g)


@njit(inline="always")
def _winners(winner, total, mask, x, kept, members, logits, start, groups, kappa):  # type: ignore[no-untyped-def]
    """winner (G,) = bits of the N largest logits; total (G,) = the probability of that set. Draws no noise; mask and x are scratch."""
    for j in range(x.shape[0]):
        line = logits[j, start : start + groups]
        for g in range(groups):
            x[j, g] = load(line, g)
    for g in range(0, groups, LANES):
        subset_blocks.keep_largest(kept, members, mask, x, g)
    for g in range(groups):
        winner[g] = 0
    scale = kappa * LOG2_E
    for j in range(x.shape[0]):
        bit = winner.dtype.type(1 << j)
        for g in range(groups):
            winner[g] |= bit if mask[j, g] > F(0) else winner.dtype.type(0)
            x[j, g] *= scale
    _prepare(x, total, kept, members, groups)
    for g in range(0, groups, LANES):
        subset_blocks.largest_probability(kept, members, total, x, g)


@njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, not an exception: the step refuses it by name
def forward(out, sums, winner, logits, weight, kept, members, place, key, kappa, inverse_tau, hard):  # type: ignore[no-untyped-def]
    """out (O, I) = weight * sampled mask; sums (O, 2) fp64 = its squares and the largest probabilities per row.

    winner (O, G) is filled, and the second sum, unless winner is empty.
    place = (global id of the first row, global id of the first column group, groups in a whole row).
    """
    rows, m, groups = logits.shape
    x, mask, word = np.zeros((m, TILE), np.float32), np.zeros((m, TILE), np.float32), np.zeros((4 * ((m + 3) // 4), TILE), np.uint32)
    middle, square = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    before = flush_denormals()
    for o in range(rows):
        first = U64(place[0] + o) * U64(place[2]) + U64(place[1])
        norm, largest = 0.0, 0.0
        for start in range(0, groups, TILE):
            n = min(TILE, groups - start)
            ask_for(logits, weight, m, o, start, n)
            _sample(mask, x, middle, word, kept, members, logits[o], start, n, first + U64(start), key, kappa, inverse_tau, hard)
            apply_mask(out[o, start * m : (start + n) * m], square, weight[o, start * m : (start + n) * m], mask, n)
            norm += sum_line(square, n)
            if winner.size:
                _winners(winner[o, start : start + n], square, mask, x, kept, members, logits[o], start, n, kappa)
                largest += sum_line(square, n)
        sums[o, 0], sums[o, 1] = norm, largest
    restore(before)


@njit(nogil=True, cache=True, error_model="numpy")
def backward(into, is_sum, grad, logits, weight, kept, members, place, key, kappa, inverse_tau, hard, norm_coef):  # type: ignore[no-untyped-def]
    """into (O, M, G) = or += dlogits of grad (O, I), the gradient at W * M, minus norm_coef * |W * M|^2; the noise is drawn again."""
    rows, m, groups = logits.shape
    x, mask, word = np.zeros((m, TILE), np.float32), np.zeros((m, TILE), np.float32), np.zeros((4 * ((m + 3) // 4), TILE), np.uint32)
    middle = np.zeros(TILE, np.float32)
    slope = kappa * inverse_tau
    before = flush_denormals()
    for o in range(rows):
        first = U64(place[0] + o) * U64(place[2]) + U64(place[1])
        for start in range(0, groups, TILE):
            n = min(TILE, groups - start)
            ask_for(logits, weight, m, o, start, n)
            ask_for(into, grad, m, o, start, n)
            _sample(mask, x, middle, word, kept, members, logits[o], start, n, first + U64(start), key, kappa, inverse_tau, hard)
            gradient_at_mask(mask, grad[o, start * m : (start + n) * m], weight[o, start * m : (start + n) * m], n, norm_coef)
            for g in range(0, n, LANES):
                subset_blocks.covariances(kept, members, mask, x, g)
            for j in range(m):
                line = into[o, j, start : start + n]
                if is_sum:
                    for g in range(n):
                        store(line, g, load(line, g) + slope * mask[j, g])
                else:
                    for g in range(n):
                        store(line, g, slope * mask[j, g])
    restore(before)


@njit(nogil=True, cache=True, error_model="numpy")
def survey(winner, largest, logits, kept, members, kappa):  # type: ignore[no-untyped-def]
    """winner (O, G) = bits of the N largest logits; largest (O,) fp64 = row sums of the probability of that set, no noise."""
    rows, m, groups = logits.shape
    x, mask, total = np.zeros((m, TILE), np.float32), np.zeros((m, TILE), np.float32), np.zeros(TILE, np.float32)
    before = flush_denormals()
    for o in range(rows):
        largest[o] = 0.0
        for start in range(0, groups, TILE):
            n = min(TILE, groups - start)
            _winners(winner[o, start : start + n], total, mask, x, kept, members, logits[o], start, n, kappa)
            largest[o] += sum_line(total, n)
    restore(before)
