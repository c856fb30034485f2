"""The update of MaskPro on CPUs in one pass: brings every mask's draw back from its noise, scores
it, and adds to the logits.

score.py has the maths. Noise and draw are those of k_subset_numba.forward, bit for bit. A row
is worked on in tiles whose scratch stays in the first-level cache; loops run along groups, so that
they vectorise.

Shapes: O rows, G groups per row, M group size, N drawn, K masks. Lines are (G,) of a tile.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit

from megamask.learn.maskpro.score import LEAST, MOST
from megamask.sparsity.draw import Site
from megamask.sparsity.kernels.numba_host import on_all_threads, raw_bits
from megamask.sparsity.kernels.numba_math import U64, F, exp2, flush_denormals, restore
from megamask.sparsity.kernels.numba_tiles import LOG2_E, TILE, load, perturbed, store
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.subset import llvm_polynomials
from megamask.sparsity.subset.llvm_polynomials import LANES

_LEAST, _MOST = F(LEAST) * LOG2_E, F(MOST) * LOG2_E


def add_scores(
    mask_logits: torch.Tensor, site: Site, key: NoiseKey, coefficients: Sequence[float], kind: str
) -> None:
    """``ordered_draw.add_scores`` for fp32 logits on a CPU."""
    assert mask_logits.is_contiguous() and mask_logits.dtype == torch.float32
    logits, pattern = raw_bits(mask_logits), site.pattern
    shape = (tuple(range(pattern.n)), tuple(range(pattern.m)))
    named = (np.uint64(key.seed), np.uint64(key.step), np.uint64(key.parameter))
    factors = np.array(coefficients, dtype=np.float32)

    def work(part: slice, global_row: int) -> None:
        place = (global_row, site.placement.first_group, site.placement.groups_in_row)
        _add_scores(logits[part], pattern.n, *shape, place, named, factors, kind == "set")

    on_all_threads(site.placement.blocks, work)


@njit(nogil=True, cache=True, error_model="numpy")
def _add_scores(logits, n, kept, positions, place, key, coefficients, is_set):  # type: ignore[no-untyped-def]
    """logits (O, M, G) += sum_k coefficients[k] * score of mask k; place as for
    k_subset_numba.forward.

    N is given beside the tuple ``kept`` that holds so many: loops over the subsets of N need not be
    unrolled.
    """
    rows, m, groups = logits.shape
    line, score, total = (
        np.zeros((m, TILE), np.float32),
        np.zeros((m, TILE), np.float32),
        np.zeros((m, TILE), np.float32),
    )
    x, mask, word = (
        np.zeros((m, TILE), np.float32),
        np.zeros((m, TILE), np.float32),
        np.zeros((4 * ((m + 3) // 4), TILE), np.uint32),
    )
    rank, scratch = np.zeros((m, TILE), np.int32), np.zeros((3, TILE), np.float32)
    walk, drawn = (
        np.zeros((5, 1 << n if is_set else 1, TILE), np.float32),
        np.zeros((n, TILE), np.float32),
    )
    before = flush_denormals()
    for o in range(rows):
        first = U64(place[0] + o) * U64(place[2]) + U64(place[1])
        for start in range(0, groups, TILE):
            count = min(TILE, groups - start)
            for j in range(m):
                bits = logits[o, j, start : start + count]
                for g in range(count):
                    line[j, g], total[j, g] = load(bits, g), F(0)
            for k in range(len(coefficients)):
                named = (key[0], key[1], U64(k), key[2])
                at, scales = first + U64(start), (F(1), F(1), F(1))
                perturbed(x, word, logits[o], start, count, at, named, scales)
                if is_set:
                    for g in range(0, count, LANES):
                        llvm_polynomials.keep_largest(kept, positions, mask, x, g)
                    _set_score(score, line, mask, drawn, walk, scratch, n, count)
                else:
                    _ranks(rank, x, count)
                    _ordered_score(score, line, rank, mask, scratch, n, count)
                for j in range(m):
                    for g in range(count):
                        total[j, g] += coefficients[k] * score[j, g]
            for j in range(m):
                bits = logits[o, j, start : start + count]
                for g in range(count):
                    store(bits, g, line[j, g] + total[j, g])
    restore(before)


@njit(inline="always")
def _ranks(rank, x, count):  # type: ignore[no-untyped-def]
    """rank (M, G) = how many members come before each in falling order of x (M, G), the earlier of
    equals first.
    """
    m = x.shape[0]
    for j in range(m):
        for g in range(count):
            rank[j, g] = 0
        for i in range(m):
            for g in range(count):
                rank[j, g] += 1 if x[i, g] > x[j, g] or (x[i, g] == x[j, g] and i < j) else 0


@njit(inline="always")
def _ordered_score(score, line, rank, share, scratch, n, count):  # type: ignore[no-untyped-def]
    """score (M, G) of the draws in the order of ``rank``; share (M, G) and scratch (3, G) are
    scratch.
    """
    m, (top, others, whole) = line.shape[0], scratch
    for j in range(m):
        for g in range(count):
            score[j, g] = F(0)
    for k in range(n):
        for g in range(count):
            top[g], others[g], whole[g] = F(-np.inf), F(0), F(0)
        for j in range(m):
            for g in range(count):
                top[g] = max(top[g], line[j, g]) if rank[j, g] >= k else top[g]
        for j in range(m):
            for g in range(count):
                part = exp2((line[j, g] - top[g]) * LOG2_E if rank[j, g] >= k else F(-200))
                share[j, g] = part
                whole[g] += part
                others[g] += F(0) if rank[j, g] == k else part
        for j in range(m):
            for g in range(count):
                score[j, g] += (others[g] if rank[j, g] == k else -share[j, g]) / whole[g]


@njit
def _set_score(score, line, mask, drawn, walk, scratch, n, count):  # type: ignore[no-untyped-def]
    """score (M, G) of the set of members where mask (M, G) is 1; drawn (N, G), walk (5, 2^N, G) and
    scratch (3, G) are scratch.
    """
    m, (top, inverse, seen) = line.shape[0], scratch
    for g in range(count):
        top[g], inverse[g], seen[g] = F(-np.inf), F(0), F(0)
        walk[0, 0, g] = F(0)
    for j in range(m):
        for g in range(count):
            top[g] = top[g] if mask[j, g] > F(0) else max(top[g], line[j, g])
    for j in range(m):
        for g in range(count):
            distance = min((line[j, g] - top[g]) * LOG2_E, _MOST)
            small = exp2(-abs(distance))
            weight = F(1) / small if distance > F(0) else small
            score[j, g] = weight
            walk[0, 0, g] += F(0) if mask[j, g] > F(0) else weight
        for b in range(n):
            for g in range(count):
                is_next = mask[j, g] > F(0) and seen[g] == F(b)
                drawn[b, g] = max(score[j, g], exp2(_LEAST)) if is_next else drawn[b, g]
        for g in range(count):
            seen[g] += mask[j, g]
    _walk(walk, drawn, n, count)
    whole, done, fail, visit = walk[0], walk[1], walk[2], walk[3]
    for c in range(1, 1 << n):
        for g in range(count):
            inverse[g] += visit[c, g] / whole[c, g]
    for b in range(n):
        part = walk[4, b]
        for g in range(count):
            part[g] = F(0)
        for c in range(1 << n):
            if c >> b & 1:
                d = c ^ (1 << b)
                for g in range(count):
                    gain = (
                        fail[c, g] - fail[d, g] if fail[c, g] < F(0.5) else done[d, g] - done[c, g]
                    )
                    part[g] += visit[c, g] * gain / (whole[c, g] * done[c, g])
        for g in range(count):
            drawn[b, g] *= part[g]
    for g in range(count):
        seen[g] = F(0)
    for j in range(m):
        for g in range(count):
            score[j, g] = -score[j, g] * inverse[g]
        for b in range(n):
            for g in range(count):
                score[j, g] = drawn[b, g] if mask[j, g] > F(0) and seen[g] == F(b) else score[j, g]
        for g in range(count):
            seen[g] += mask[j, g]


@njit
def _walk(walk, drawn, n, count):  # type: ignore[no-untyped-def]
    """walk[:4] (4, 2^N, G) = whole, done, fail, visit of every set of drawn members; whole of the
    empty set is there already.
    """
    whole, done, fail, visit = walk[0], walk[1], walk[2], walk[3]
    for g in range(count):
        done[0, g], fail[0, g], visit[0, g] = F(1), F(0), F(0)
    for c in range(1, 1 << n):
        lowest = 0
        while not c >> lowest & 1:
            lowest += 1
        for g in range(count):
            whole[c, g] = whole[c & (c - 1), g] + drawn[lowest, g]
            done[c, g], fail[c, g], visit[c, g] = F(0), walk[0, 0, g], F(0)
        for b in range(n):
            if c >> b & 1:
                for g in range(count):
                    done[c, g] += drawn[b, g] * done[c ^ (1 << b), g]
                    fail[c, g] += drawn[b, g] * fail[c ^ (1 << b), g]
        for g in range(count):
            done[c, g] /= whole[c, g]
            fail[c, g] /= whole[c, g]
    for g in range(count):
        visit[(1 << n) - 1, g] = F(1)
    for c in range((1 << n) - 1, 0, -1):
        for b in range(n):
            if c >> b & 1:
                d = c ^ (1 << b)
                for g in range(count):
                    visit[d, g] += (
                        visit[c, g] * drawn[b, g] * done[d, g] / (whole[c, g] * done[c, g])
                    )
