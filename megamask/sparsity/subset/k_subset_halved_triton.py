"""The kernels of k_subset_triton.py for groups of 16, 24 or 32 positions: half of a group a thread.

Unrolled over 16 positions, the backward pass needs more registers than a thread has, and minutes to
compile. Here a tile has an axis for the two halves, and one code serves both: a thread holds the
positions of its half, and gets from its partner the scores to rank by and the polynomial of the
partner's positions, which stands before its own factors as a prefix:

    A_j = sum_c (Q P_j)[c] S_{j+1}[N - 1 - c]

with Q the product over the other half, and P_j, S_{j+1} within the half. To the helpers of the
unrolled kernels a half is a group of H = M / 2 positions: number 2 g + h of a row where memory is
read by groups, row 2 o + h where it is read by positions.

Shapes: O rows, G groups per row, M group size, H = M / 2. Tensors of a program are (ROWS, 2, COLS).
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
)
from megamask.sparsity.pattern import Pattern
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


def kernels_of(pattern: Pattern, device: torch.device) -> Kernels:
    """The kernels for this pattern, whose half is a multiple of four positions."""
    shape = {"N": pattern.n, "M": pattern.m}
    return Kernels(forward, backward, mask_statistics, shape, shape, threads_a_group=2)


@triton.jit
def _tile(row, column, rows, groups, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows (ROWS, 1, 1) int64, halves (1, 2, 1) and groups (1, 1, COLS) of a tile, and which of
    them exist, (ROWS, 2, COLS).
    """
    o = row * ROWS + tl.arange(0, ROWS)[:, None, None]
    h = tl.arange(0, 2)[None, :, None]
    g = column * COLS + tl.arange(0, COLS)[None, None, :]
    return o.to(tl.int64), h, g, (o < rows) & (g < groups) & (h < 2)


@triton.jit
def _other(value):
    """What the other half has."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ tl.xor_sum(bits, 1, keep_dims=True)).to(value.dtype, bitcast=True)


@triton.jit
def _four_others(a, b, c, d):
    """Four exchanged together, which takes a quarter of the barriers."""
    first, last = tl.split(_other(tl.join(tl.join(a, b), tl.join(c, d))))
    a, b = tl.split(first)
    c, d = tl.split(last)
    return a, b, c, d


@triton.jit
def _others(values, COUNT: tl.constexpr):
    """What the other half has of each."""
    others = ()
    for i in tl.static_range(COUNT // 4):
        others = others + _four_others(
            values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]
        )
    for i in tl.static_range(COUNT // 4 * 4, COUNT):
        others = others + (_other(values[i]),)
    return others


@triton.jit
def _both(value):
    """The sum over both halves, the same to the last bit in both."""
    return value + _other(value)


@triton.jit
def _ranks(values, h, H: tl.constexpr):
    """How many positions of the group come before each."""
    ranks, others, within = (), _others(values, H), ranks_of(values, H)
    for j in tl.static_range(H):
        before = within[j]
        for i in tl.static_range(H):
            is_first = tl.where(h == 1, others[i] >= values[j], others[i] > values[j])
            before += is_first.to(tl.int32)
        ranks = ranks + (before,)
    return ranks


@triton.jit
def _marginals(u, v, N: tl.constexpr, M: tl.constexpr):
    """Probability that each position of a half is kept."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    H: tl.constexpr = M // 2
    suffixes = suffixes_of(u, v, K, H)
    own = times(suffixes[H - 1], u[0], v[0], K)
    prefix = _others(own, len(own))
    part = 1.0 / coefficient(prefix, own, K, 0, u[0], len(prefix))
    masks = ()
    for j in tl.static_range(H):
        suffix = suffixes[H - 1 - j]
        if 2 * N <= M:
            kept = v[j] * coefficient(prefix, suffix, K - 1, 0, u[0], len(prefix))
        else:
            kept = u[j] * coefficient(prefix, suffix, K, 0, u[0], len(prefix))
        masks = masks + (kept * part,)
        prefix = times(prefix, u[j], v[j], K)
    return masks


@triton.jit
def _covariances(u, v, d, N: tl.constexpr, M: tl.constexpr):
    """As k_subset_triton._covariances, of the positions of a half."""
    K: tl.constexpr = N if 2 * N <= M else M - N
    H: tl.constexpr = M // 2
    suffixes, last = suffixes_of(u, v, K, H), ()
    tails = (last,)
    for j in tl.static_range(1, H):
        after = suffixes[j - 1]
        last = sums_times(after, last, u[H - j], v[H - j], d[H - j], K, len(after))
        tails = tails + (last,)
    after = suffixes[H - 1]
    own, last = (
        times(after, u[0], v[0], K),
        sums_times(after, last, u[0], v[0], d[0], K, len(after)),
    )
    prefix, sums = _others(own, len(own)), _others(last, len(last))
    part = 1.0 / coefficient(prefix, own, K, 0, u[0], len(prefix))
    found = ()
    for j in tl.static_range(H):
        suffix, tail = suffixes[H - 1 - j], tails[H - 1 - j]
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
def _statistics(pis, h, kappa, N: tl.constexpr, M: tl.constexpr):
    """Bits of the N largest logits, int32, and the probability of that set without noise, in both
    halves.
    """
    K: tl.constexpr = N if 2 * N <= M else M - N
    H: tl.constexpr = M // 2
    ranks, bits, scores = _ranks(pis, h, H), tl.zeros(pis[0].shape, tl.int32), ()
    for j in tl.static_range(H):
        bits = bits | ((ranks[j] < N).to(tl.int32) << j)
        scores = scores + (kappa * pis[j],)
    bits = bits << (h * H)
    middle = _both(middle_of(scores, ranks, N, H))
    u, v = factors_of(scores, middle, 2 * N > M, H)
    own = product_of(u, v, K, H)
    return bits | _other(bits), 1.0 / coefficient(_others(own, len(own)), own, K, 0, u[0], len(own))


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
    """As k_subset_triton.forward."""
    H: tl.constexpr = M // 2
    squares = tl.zeros((ROWS, 2, COLS), tl.float32)
    largest = tl.zeros((ROWS, 2, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, h, g, inside = _tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, 2 * o + h, g, inside, groups, H)
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        half = (h * (H // 4)).to(tl.uint32)
        scores = scores_of(pis, named, slope, noise_scale, NOISE, H, half)
        ranks = _ranks(scores, h, H)
        if HARD:
            masks = hard_masks(ranks, _both(not_finite(scores, H)), N, H)
        else:
            middle = _both(middle_of(scores, ranks, N, H))
            u, v = factors_of(scores, middle, 2 * N > M, H)
            masks = _marginals(u, v, N, M)
        squares += mask_positions(masked, weight, masks, o, 2 * g + h, inside, 2 * groups, H, BITS)
        if STATISTICS:
            bits, probability = _statistics(pis, h, kappa, N, M)
            once = inside & (h == 0)
            tl.store(
                hard_codes + o * groups + (g + 0 * h),
                bits.to(hard_codes.dtype.element_ty),
                mask=once,
            )
            largest += tl.where(once, probability, 0.0)
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
    """As k_subset_triton.backward."""
    H: tl.constexpr = M // 2
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, h, g, inside = _tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, 2 * o + h, g, inside, groups, H)
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        half = (h * (H // 4)).to(tl.uint32)
        scores = scores_of(pis, named, slope, noise_scale, NOISE, H, half)
        ranks = _ranks(scores, h, H)
        middle = _both(middle_of(scores, ranks, N, H))
        u, v = factors_of(scores, middle, 2 * N > M, H)
        masks = (
            hard_masks(ranks, _both(not_finite(scores, H)), N, H)
            if HARD
            else _marginals(u, v, N, M)
        )
        dmasks = mask_gradients(
            grad, weight, masks, norm_coef, o, 2 * g + h, inside, 2 * groups, H, BITS, GRAD_BITS
        )
        found = _covariances(u, v, dmasks, N, M)
        line = dlogits + (2 * o + h) * H * groups + g
        for j in tl.static_range(H):
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
    """As k_subset_triton.mask_statistics."""
    largest = tl.zeros((ROWS, 2, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, h, g, inside = _tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, 2 * o + h, g, inside, groups, M // 2)
        bits, probability = _statistics(pis, h, kappa, N, M)
        once = inside & (h == 0)
        tl.store(
            hard_codes + o * groups + (g + 0 * h), bits.to(hard_codes.dtype.element_ty), mask=once
        )
        largest += tl.where(once, probability, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(largest))
