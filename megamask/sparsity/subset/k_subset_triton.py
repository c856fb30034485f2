"""Fused sampling of the k-subset distribution for Triton: gumbel_softmax_triton.py with the
positions of a group in the place of its candidates.

k_subset.py has the maths. Positions are unrolled: all of a group is in the registers of one thread.
A polynomial is a tuple of coefficients from degree 0 on. ``sums`` (of w(S) d(S)) starts at degree
1, because the coefficient of the empty set is 0. K = min(N, M - N).

A helper that takes two tuples is told the length of the first. Triton 3.6 names a helper's code by
the types of its arguments in a row, without the borders of tuples: a call with tuples of one and
two would meet the code for tuples of two and one.

Shapes: O rows, G groups per row, M group size, I = G * M.
"""

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from megamask.sparsity.kernels.triton_tiles import (
    CHANGING,
    Kernels,
    counter,
    exp,
    first_tile,
    mask_gradients,
    mask_positions,
    next_tile,
    read_logits,
    rounded,
    scores_of,
    tile,
)
from megamask.sparsity.pattern import Pattern

FEW = 4  # up to so many positions, a thread has registers for four groups


def kernels_of(pattern: Pattern, device: torch.device) -> Kernels:
    """The kernels for this pattern."""
    shape = {"N": pattern.n, "M": pattern.m}
    several = 4 if pattern.m <= FEW else 1
    return Kernels(forward, backward, mask_statistics, shape, shape, several)


@triton.jit
def ranks_of(values, M: tl.constexpr):
    """How many positions come before each, the largest first, the earlier of equals first."""
    ranks = ()
    for j in tl.static_range(M):
        before = tl.zeros(values[j].shape, tl.int32)
        for i in tl.static_range(M):
            if i < j:
                before += (values[i] >= values[j]).to(tl.int32)
            if i > j:
                before += (values[i] > values[j]).to(tl.int32)
        ranks = ranks + (before,)
    return ranks


@triton.jit
def not_finite(values, M: tl.constexpr):
    """0, or NaN in a group with a value that is not finite."""
    bad = values[0] - values[0]
    for j in tl.static_range(1, M):
        bad += values[j] - values[j]
    return bad


@triton.jit
def _factors(scores, ranks, N: tl.constexpr, M: tl.constexpr):
    """u + v z of every position, for the sets of K."""
    middle = not_finite(scores, M)
    for j in tl.static_range(M):
        middle += tl.where((ranks[j] == N - 1) | (ranks[j] == N), 0.5 * scores[j], 0.0)
    u, v = (), ()
    for j in tl.static_range(M):
        distance = scores[j] - middle
        small = exp(-tl.abs(distance))
        u = u + (tl.where(distance > 0, small, 1.0),)
        v = v + (tl.where(distance > 0, 1.0, small),)
    if 2 * N > M:
        u, v = v, u
    return u, v


@triton.jit
def _times(poly, u, v, K: tl.constexpr):
    """``poly`` times u + v z, without what exceeds K."""
    product = (u * poly[0],)
    for c in tl.static_range(1, len(poly)):
        product = product + (tl.fma(u, poly[c], v * poly[c - 1]),)
    if len(poly) <= K:
        product = product + (v * poly[len(poly) - 1],)
    return product


@triton.jit
def _sums_times(poly, sums, u, v, d, K: tl.constexpr, LENGTH: tl.constexpr):
    """The sums with one more position; LENGTH is that of ``poly``."""
    product = ()
    for c in tl.static_range(1, LENGTH + 1):
        if c <= K:
            term = d * poly[c - 1]
            if c > 1:
                term = tl.fma(d, poly[c - 1], sums[c - 2])
            term = v * term
            if c <= len(sums):
                term = tl.fma(u, sums[c - 1], term)
            product = product + (term,)
    return product


@triton.jit
def _coefficient(a, b, degree: tl.constexpr, FIRST: tl.constexpr, like, LENGTH: tl.constexpr):
    """That of z^degree in a b; the degrees of ``b`` start at FIRST, and LENGTH is that of ``a``."""
    total = tl.zeros(like.shape, tl.float32)
    for c in tl.static_range(LENGTH):
        if degree - c >= FIRST and degree - c < len(b) + FIRST:
            total = tl.fma(a[c], b[degree - c - FIRST], total)
    return total


@triton.jit
def _whole(u, v, K: tl.constexpr, M: tl.constexpr):
    """Coefficient of z^K in the product of all factors: the sum over all sets."""
    product = (tl.full(u[0].shape, 1.0, tl.float32),)
    for j in tl.static_range(M):
        product = _times(product, u[j], v[j], K)
    return product[K]


@triton.jit
def _suffixes(u, v, K: tl.constexpr, M: tl.constexpr):
    """Products of the last 0 .. M - 1 factors."""
    suffix = (tl.full(u[0].shape, 1.0, tl.float32),)
    found = (suffix,)
    for j in tl.static_range(1, M):
        suffix = _times(suffix, u[M - j], v[M - j], K)
        found = found + (suffix,)
    return found


@triton.jit
def _marginals(u, v, N: tl.constexpr, M: tl.constexpr):
    """Probability that each position is kept."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    suffixes = _suffixes(u, v, K, M)
    # the same for every position: the sum over all sets
    part = 1.0 / tl.fma(v[0], suffixes[M - 1][K - 1], u[0] * suffixes[M - 1][K])
    prefix = (tl.full(u[0].shape, 1.0, tl.float32),)
    masks = ()
    for j in tl.static_range(M):
        suffix = suffixes[M - 1 - j]
        if 2 * N <= M:
            masks = masks + (
                v[j] * _coefficient(prefix, suffix, K - 1, 0, u[0], len(prefix)) * part,
            )
        else:
            masks = masks + (u[j] * _coefficient(prefix, suffix, K, 0, u[0], len(prefix)) * part,)
        prefix = _times(prefix, u[j], v[j], K)
    return masks


@triton.jit
def _covariances(u, v, d, N: tl.constexpr, M: tl.constexpr):
    """Covariance of each position's presence with the sum of d over the set."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    suffixes, last = _suffixes(u, v, K, M), ()
    tails = (last,)
    for j in tl.static_range(1, M):
        after = suffixes[j - 1]
        last = _sums_times(after, last, u[M - j], v[M - j], d[M - j], K, len(after))
        tails = tails + (last,)
    part = 1.0 / tl.fma(v[0], suffixes[M - 1][K - 1], u[0] * suffixes[M - 1][K])
    prefix, sums = (tl.full(u[0].shape, 1.0, tl.float32),), ()
    found = ()
    for j in tl.static_range(M):
        suffix, tail = suffixes[M - 1 - j], tails[M - 1 - j]
        a = _coefficient(prefix, suffix, K - 1, 0, part, len(prefix))
        b = _coefficient(prefix, suffix, K, 0, part, len(prefix))
        qa = _coefficient(suffix, sums, K - 1, 1, part, len(suffix))
        qa += _coefficient(prefix, tail, K - 1, 1, part, len(prefix))
        qb = _coefficient(suffix, sums, K, 1, part, len(suffix))
        qb += _coefficient(prefix, tail, K, 1, part, len(prefix))
        difference = tl.fma(qa, b, -(qb * a))
        found = found + ((v[j] * part) * (u[j] * part) * tl.fma(d[j] * a, b, difference),)
        sums = _sums_times(prefix, sums, u[j], v[j], d[j], K, len(prefix))
        prefix = _times(prefix, u[j], v[j], K)
    return found


@triton.jit
def _hard(scores, ranks, N: tl.constexpr, M: tl.constexpr):
    """1 for the N largest, else 0; NaN in a group with a score that is not finite."""
    bad, masks = not_finite(scores, M), ()
    for j in tl.static_range(M):
        masks = masks + (tl.where(ranks[j] < N, 1.0, 0.0) + bad,)
    return masks


@triton.jit
def _statistics(pis, kappa, N: tl.constexpr, M: tl.constexpr):
    """Bits of the N largest logits, int32, and the probability of that set without noise."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    ranks, hard_codes, scores = ranks_of(pis, M), tl.zeros(pis[0].shape, tl.int32), ()
    for j in tl.static_range(M):
        hard_codes = hard_codes | ((ranks[j] < N).to(tl.int32) << j)
        scores = scores + (kappa * pis[j],)
    u, v = _factors(scores, ranks, N, M)
    return hard_codes, 1.0 / _whole(u, v, K, M)


@triton.jit(do_not_specialize=CHANGING + ("programs", "kappa"))
def forward(
    masked,
    hard_codes,
    sums,
    logits,
    weight,
    rows: tl.int32,
    groups: tl.int32,
    programs: tl.int32,
    global_row: tl.int64,
    first_group: tl.int64,
    groups_in_row: tl.int64,
    seed: tl.uint32,
    step: tl.uint32,
    parameter: tl.uint32,
    micro_batch: tl.uint32,
    slope,
    noise_scale,
    kappa,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """As gumbel_softmax_triton.forward; hard_codes holds the bits of the kept positions."""
    squares = tl.zeros((ROWS, COLS), tl.float32)
    largest = tl.zeros((ROWS, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, o, g, inside, groups, M)
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        scores = scores_of(pis, named, slope, noise_scale, NOISE, M)
        ranks = ranks_of(scores, M)
        if HARD:
            masks = _hard(scores, ranks, N, M)
        else:
            u, v = _factors(scores, ranks, N, M)
            masks = _marginals(u, v, N, M)
        squares += mask_positions(masked, weight, masks, o, g, inside, groups, M, BITS)
        if STATISTICS:
            bits, probability = _statistics(pis, kappa, N, M)
            tl.store(hard_codes + o * groups + g, bits.to(hard_codes.dtype.element_ty), mask=inside)
            largest += tl.where(inside, probability, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(squares))
    tl.store(sums + programs + tl.program_id(0), tl.sum(largest))


@triton.jit(do_not_specialize=CHANGING + ("norm_coef",))
def backward(
    dlogits,
    grad,
    logits,
    weight,
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
    norm_coef,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    GRAD_BITS: tl.constexpr,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """As gumbel_softmax_triton.backward."""
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, o, g, inside, groups, M)
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        scores = scores_of(pis, named, slope, noise_scale, NOISE, M)
        ranks = ranks_of(scores, M)
        u, v = _factors(scores, ranks, N, M)
        masks = _hard(scores, ranks, N, M) if HARD else _marginals(u, v, N, M)
        dmasks = mask_gradients(
            grad, weight, masks, norm_coef, o, g, inside, groups, M, BITS, GRAD_BITS
        )
        found = _covariances(u, v, dmasks, N, M)
        line = dlogits + o * M * groups + g
        for j in tl.static_range(M):
            result = slope * found[j]
            if ADD:
                result += tl.load(line + j * groups, mask=inside, other=0.0).to(tl.float32)
            tl.store(line + j * groups, rounded(result, dlogits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "kappa"))
def mask_statistics(
    hard_codes,
    sums,
    logits,
    rows: tl.int32,
    groups: tl.int32,
    kappa,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """As gumbel_softmax_triton.mask_statistics; hard_codes holds the bits of the kept positions."""
    largest = tl.zeros((ROWS, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        bits, probability = _statistics(read_logits(logits, o, g, inside, groups, M), kappa, N, M)
        tl.store(hard_codes + o * groups + g, bits.to(hard_codes.dtype.element_ty), mask=inside)
        largest += tl.where(inside, probability, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(largest))
