"""The update of MaskPro for Triton: brings every mask's draw back from its noise, scores it, and
adds to the logits, in one pass over them.

score.py has the maths. Noise and draw are those of k_subset_triton.forward, bit for bit: both
compute the same scores of positions from the same arguments. A program of the kernel goes through
the masks one after the other, so that their number is no constant of the kernel. All of a group is
in the registers of one thread.

Shapes: O rows, G groups per row, M group size, N drawn, K masks.
"""

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from megamask.learn.maskpro.score import LEAST, MOST, sample_of
from megamask.sparsity.draw import Site
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.kernels.triton_tiles import (
    CHANGING,
    counter,
    exp,
    first_tile,
    next_tile,
    read_logits,
    scores_of,
    tile,
)
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.subset.triton_polynomials import not_finite, ranks_of

_LEAST, _MOST = tl.constexpr(LEAST), tl.constexpr(MOST)
LOWEST = tl.constexpr(-1.0e30)  # below every logit; finite, so that differences are no NaN


def add_scores(
    mask_logits: torch.Tensor, site: Site, key: NoiseKey, coefficients: Sequence[float], kind: str
) -> None:
    """``score.add_scores`` for fp32 logits on CUDA. The host does not wait for the device."""
    assert mask_logits.is_contiguous() and mask_logits.dtype == torch.float32
    logits, pattern = mask_logits.detach(), site.pattern
    rows, _, groups = logits.shape
    factors = torch.tensor(coefficients, dtype=torch.float32).to(logits.device, non_blocking=True)
    cut = triton_host.Cut.of(rows, groups)
    for block, here in triton_host.blocks_of(site):
        triton_host.launch(
            add_scores_kernel,
            cut.programs(block.rows),
            logits,
            logits[here],
            factors,
            len(coefficients),
            block.rows,
            groups,
            *triton_host.place_arguments(block, site),
            *triton_host.noise_arguments(sample_of(replace(key, micro_batch=0))),
            N=pattern.n,
            M=pattern.m,
            IS_SET=kind == "set",
            **cut.constants,
        )


@triton.jit
def _zeros(like, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros(like.shape, tl.float32),)
    return zeros


@triton.jit
def _ordered_scores(pis, ranks, N: tl.constexpr, M: tl.constexpr):
    """M scores of the draws in the order of ``ranks``."""
    scores = _zeros(pis[0], M)
    for k in range(N):
        top = tl.full(pis[0].shape, LOWEST, tl.float32)
        for j in tl.static_range(M):
            top = tl.where(ranks[j] >= k, tl.maximum(top, pis[j]), top)
        shares, others, drawn = (), tl.zeros(top.shape, tl.float32), tl.zeros(top.shape, tl.float32)
        for j in tl.static_range(M):
            share = tl.where(ranks[j] >= k, exp(tl.minimum(pis[j] - top, 0.0)), 0.0)
            others += tl.where(ranks[j] == k, 0.0, share)
            drawn += tl.where(ranks[j] == k, share, 0.0)
            shares = shares + (share,)
        part, more = 1.0 / (others + drawn), ()
        for j in tl.static_range(M):
            value = tl.where(ranks[j] == k, others, -shares[j])
            more = more + (tl.fma(value, part, scores[j]),)
        scores = more
    return scores


@triton.jit
def _weights(pis, ranks, N: tl.constexpr, M: tl.constexpr):
    """Weights of M positions in units of the largest that is not drawn, held in range, the sum of
    those that are not drawn, and the weights of the N drawn in the order of their ranks.
    """
    top = tl.full(pis[0].shape, LOWEST, tl.float32)
    for j in tl.static_range(M):
        top = tl.where(ranks[j] < N, top, tl.maximum(top, pis[j]))
    weights, rest, drawn = (), tl.zeros(top.shape, tl.float32), ()
    for j in tl.static_range(M):
        weight = exp(tl.minimum(tl.maximum(pis[j] - top, -100.0), _MOST))
        rest += tl.where(ranks[j] < N, 0.0, weight)
        weights = weights + (weight,)
    for b in tl.static_range(N):
        found = tl.zeros(top.shape, tl.float32)
        for j in tl.static_range(M):
            found = tl.where(ranks[j] == b, weights[j], found)
        drawn = drawn + (tl.maximum(found, exp(tl.zeros(top.shape, tl.float32) + _LEAST)),)
    return weights, rest, drawn


@triton.jit
def _up(rest, drawn, N: tl.constexpr):
    """(whole, done, fail) of every set C of drawn members; bit b of C's number stands for
    drawn[b].
    """
    whole, done, fail = (rest,), (rest * 0 + 1,), (rest * 0,)
    for c in tl.static_range(1, 2**N):
        total, stays, leaves = rest, rest * 0, rest
        for b in tl.static_range(N):
            if (c >> b) & 1:
                total += drawn[b]
                stays = tl.fma(drawn[b], done[c ^ (1 << b)], stays)
                leaves = tl.fma(drawn[b], fail[c ^ (1 << b)], leaves)
        whole, done, fail = whole + (total,), done + (stays / total,), fail + (leaves / total,)
    return whole, done, fail


@triton.jit
def _plus(values, at: tl.constexpr, term, COUNT: tl.constexpr):
    """``values`` with ``term`` added to number ``at``."""
    more = ()
    for i in tl.static_range(COUNT):
        more = more + ((values[i] + term,) if i == at else (values[i],))
    return more


@triton.jit
def _set_scores(pis, ranks, N: tl.constexpr, M: tl.constexpr):
    """M scores of the set of the positions with ranks below N."""
    weights, rest, drawn = _weights(pis, ranks, N, M)
    whole, done, fail = _up(rest, drawn, N)
    visits, parts = _zeros(rest, 2**N), _zeros(rest, N)
    visits, inverse = _plus(visits, 2**N - 1, 1.0, 2**N), rest * 0
    for c in tl.static_range(2**N - 1, 0, -1):
        inverse += visits[c] / whole[c]
        share = visits[c] / (whole[c] * done[c])
        for b in tl.static_range(N):
            if (c >> b) & 1:
                stays, leaves = done[c ^ (1 << b)], fail[c ^ (1 << b)]
                gain = tl.where(fail[c] < 0.5, fail[c] - leaves, stays - done[c])
                parts = _plus(parts, b, share * gain, N)
                visits = _plus(visits, c ^ (1 << b), share * (drawn[b] * stays), 2**N)
    scores = ()
    for j in tl.static_range(M):
        score = -weights[j] * inverse
        for b in tl.static_range(N):
            score = tl.where(ranks[j] == b, drawn[b] * parts[b], score)
        scores = scores + (score,)
    return scores


@triton.jit(do_not_specialize=(*CHANGING, "masks"))
def add_scores_kernel(
    logits,
    coefficients,
    masks: tl.int32,
    rows: tl.int32,
    groups: tl.int32,
    global_row: tl.int64,
    first_group: tl.int64,
    groups_in_row: tl.int64,
    seed: tl.uint32,
    step: tl.uint32,
    parameter: tl.uint32,
    micro_batch: tl.uint32,
    slope,
    noise_scale,
    N: tl.constexpr,
    M: tl.constexpr,
    IS_SET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """logits (O, M, G) += sum_k coefficients[k] * score of mask k, whose noise has the number
    ``micro_batch`` + k; NaN in all of a group with a logit that is not finite.
    """
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, o, g, inside, groups, M)
        ids = (global_row + o) * groups_in_row + first_group + g
        total = ()
        for _ in tl.static_range(M):
            total = total + (not_finite(pis, M),)
        for k in range(masks):
            named = counter(ids, parameter, micro_batch + k, seed, step)
            ranks = ranks_of(scores_of(pis, named, slope, noise_scale, True, M), M)
            scores = _set_scores(pis, ranks, N, M) if IS_SET else _ordered_scores(pis, ranks, N, M)
            coefficient, more = tl.load(coefficients + k), ()
            for j in tl.static_range(M):
                more = more + (tl.fma(coefficient, scores[j], total[j]),)
            total = more
        line = logits + o * M * groups + g
        for j in tl.static_range(M):
            tl.store(line + j * groups, pis[j] + total[j], mask=inside)
