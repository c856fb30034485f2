"""Fused sampling of the k-subset distribution for Triton: gumbel_softmax_triton.py with the
positions of a group in the place of its candidates.

k_subset.py has the maths, triton_polynomials.py its polynomials. Positions are unrolled: all of a
group is in the registers of one thread. K = min(N, M - N).

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
from megamask.sparsity.subset import k_subset_halved_triton
from megamask.sparsity.subset.triton_polynomials import (
    coefficient,
    factors_of,
    hard_masks,
    middle_of,
    not_finite,
    product_of,
    ranks_of,
    suffixes_of,
    sums_times,
    times,
)

UNROLLED = 8  # up to so many positions, a thread has registers for a group
FEW = 4  # up to so many positions, a thread has registers for four groups


def kernels_of(pattern: Pattern, device: torch.device) -> Kernels:
    """The kernels for this pattern: of this file, or those that halve a group."""
    if pattern.m > UNROLLED and pattern.m % 8 == 0:
        return k_subset_halved_triton.kernels_of(pattern, device)
    shape = {"N": pattern.n, "M": pattern.m}
    several = 4 if pattern.m <= FEW else 1
    return Kernels(forward, backward, mask_statistics, shape, shape, several)


@triton.jit
def _marginals(u, v, N: tl.constexpr, M: tl.constexpr):
    """Probability that each position is kept."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    suffixes = suffixes_of(u, v, K, M)
    # the same for every position: the sum over all sets
    part = 1.0 / tl.fma(v[0], suffixes[M - 1][K - 1], u[0] * suffixes[M - 1][K])
    prefix = (tl.full(u[0].shape, 1.0, tl.float32),)
    masks = ()
    for j in tl.static_range(M):
        suffix = suffixes[M - 1 - j]
        if 2 * N <= M:
            masks = masks + (
                v[j] * coefficient(prefix, suffix, K - 1, 0, u[0], len(prefix)) * part,
            )
        else:
            masks = masks + (u[j] * coefficient(prefix, suffix, K, 0, u[0], len(prefix)) * part,)
        prefix = times(prefix, u[j], v[j], K)
    return masks


@triton.jit
def _covariances(u, v, d, N: tl.constexpr, M: tl.constexpr):
    """Covariance of each position's presence with the sum of d over the set."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    suffixes, last = suffixes_of(u, v, K, M), ()
    tails = (last,)
    for j in tl.static_range(1, M):
        after = suffixes[j - 1]
        last = sums_times(after, last, u[M - j], v[M - j], d[M - j], K, len(after))
        tails = tails + (last,)
    part = 1.0 / tl.fma(v[0], suffixes[M - 1][K - 1], u[0] * suffixes[M - 1][K])
    prefix, sums = (tl.full(u[0].shape, 1.0, tl.float32),), ()
    found = ()
    for j in tl.static_range(M):
        suffix, tail = suffixes[M - 1 - j], tails[M - 1 - j]
        a = coefficient(prefix, suffix, K - 1, 0, part, len(prefix))
        b = coefficient(prefix, suffix, K, 0, part, len(prefix))
        qa = coefficient(suffix, sums, K - 1, 1, part, len(suffix))
        qa += coefficient(prefix, tail, K - 1, 1, part, len(prefix))
        qb = coefficient(suffix, sums, K, 1, part, len(suffix))
        qb += coefficient(prefix, tail, K, 1, part, len(prefix))
        difference = tl.fma(qa, b, -(qb * a))
        found = found + ((v[j] * part) * (u[j] * part) * tl.fma(d[j] * a, b, difference),)
        sums = sums_times(prefix, sums, u[j], v[j], d[j], K, len(prefix))
        prefix = times(prefix, u[j], v[j], K)
    return found


@triton.jit
def _statistics(pis, kappa, N: tl.constexpr, M: tl.constexpr):
    """Bits of the N largest logits, int32, and the probability of that set without noise."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    ranks, hard_codes, scores = ranks_of(pis, M), tl.zeros(pis[0].shape, tl.int32), ()
    for j in tl.static_range(M):
        hard_codes = hard_codes | ((ranks[j] < N).to(tl.int32) << j)
        scores = scores + (kappa * pis[j],)
    u, v = factors_of(scores, middle_of(scores, ranks, N, M), 2 * N > M, M)
    return hard_codes, 1.0 / product_of(u, v, K, M)[K]


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
            masks = hard_masks(ranks, not_finite(scores, M), N, M)
        else:
            u, v = factors_of(scores, middle_of(scores, ranks, N, M), 2 * N > M, M)
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
        u, v = factors_of(scores, middle_of(scores, ranks, N, M), 2 * N > M, M)
        masks = hard_masks(ranks, not_finite(scores, M), N, M) if HARD else _marginals(u, v, N, M)
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
