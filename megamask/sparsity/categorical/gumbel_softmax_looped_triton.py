"""The kernels of gumbel_softmax_triton.py for patterns with many candidates (4:8 has 70): loops
over blocks of four instead of unrolled code.

The softmax is accumulated online, and the backward pass makes the noise twice. ``codes`` (C rounded
up to a multiple of 4) int64 holds the candidate table, bit j of a code set where the candidate
keeps position j.

Shapes: O rows, G groups per row, C candidates, M group size, I = G * M.
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
    rounded,
    score_of,
    tile,
    word_block,
)
from megamask.sparsity.pattern import Pattern

LOWEST = tl.constexpr(-1.0e30)  # finite, so that no difference of scores is inf - inf


def kernels_of(pattern: Pattern, device: torch.device) -> Kernels:
    """The kernels for this pattern, with the candidate table on the device."""
    codes = [sum(1 << j for j in kept) for kept in pattern.kept_positions]
    candidates = {"C": pattern.num_candidates}
    table = torch.tensor([*codes, 0, 0, 0], device=device)
    constants = {**candidates, "M": pattern.m, "codes": table}
    return Kernels(forward, backward, mask_statistics, constants, candidates)


@triton.jit
def _block_scores(
    line,
    inside,
    named,
    block,
    slope,
    noise_scale,
    NOISE: tl.constexpr,
    C: tl.constexpr,
    groups,
):
    """Scores of candidates 4 block .. 4 block + 3, and their largest; LOWEST where there is no such
    candidate.
    """
    scores, top = (), tl.full(inside.shape, LOWEST, tl.float32)
    if NOISE:
        words = word_block(named, block)
    count = tl.where(inside, C, 0)
    for i in tl.static_range(4):
        exists = count > block * 4 + i
        pi = tl.load(line + (block * 4 + i) * groups, mask=exists, other=0.0).to(tl.float32)
        score = score_of(pi, words[i], slope, noise_scale) if NOISE else pi * slope
        score = tl.where(exists, score, LOWEST)
        scores, top = scores + (score,), tl.maximum(top, score, propagate_nan=tl.PropagateNan.ALL)
    return scores, top


@triton.jit
def _soft(
    line,
    inside,
    codes,
    named,
    slope,
    noise_scale,
    NOISE: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    groups,
):
    """Largest score, sum of exp(score - largest), and the M soft mask entries."""
    top = tl.full(inside.shape, LOWEST, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    masks = ()
    for _ in tl.static_range(M):
        masks = masks + (tl.zeros(inside.shape, tl.float32),)
    for block in range((C + 3) // 4):
        scores, highest = _block_scores(
            line, inside, named, block, slope, noise_scale, NOISE, C, groups
        )
        highest = tl.maximum(top, highest, propagate_nan=tl.PropagateNan.ALL)
        shrink = exp(top - highest)
        total, masks, top = total * shrink, _scaled(masks, shrink, M), highest
        for i in tl.static_range(4):
            power, code = exp(scores[i] - top), tl.load(codes + block * 4 + i)
            total, masks = total + power, _with(masks, power, code, M)
    return top, total, _scaled(masks, 1.0 / total, M)


@triton.jit
def _scaled(values, factor, M: tl.constexpr):
    scaled = ()
    for j in tl.static_range(M):
        scaled = scaled + (values[j] * factor,)
    return scaled


@triton.jit
def _with(masks, power, code, M: tl.constexpr):
    """Masks plus ``power`` times a candidate."""
    more = ()
    for j in tl.static_range(M):
        more = more + (masks[j] + tl.where((code >> j) & 1 != 0, power, 0.0),)
    return more


@triton.jit
def _hard(
    line,
    inside,
    codes,
    named,
    slope,
    noise_scale,
    NOISE: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    groups,
):
    """The M entries of the candidate with the first largest score; NaN in a group with a score that
    is NaN or infinite.
    """
    top = tl.full(inside.shape, LOWEST, tl.float32)
    hard_codes = tl.full(inside.shape, 0, tl.int64)
    for block in range((C + 3) // 4):
        scores, highest = _block_scores(
            line, inside, named, block, slope, noise_scale, NOISE, C, groups
        )
        for i in tl.static_range(4):
            better, code = scores[i] > top, tl.load(codes + block * 4 + i)
            hard_codes = tl.where(better, code, hard_codes)
            top = tl.maximum(top, scores[i], propagate_nan=tl.PropagateNan.ALL)
    masks = ()
    for j in tl.static_range(M):
        masks = masks + (((hard_codes >> j) & 1).to(tl.float32) + (top - top),)
    return masks


@triton.jit
def _statistics(line, inside, kappa, C: tl.constexpr, groups):
    """Index of the first largest logit, and max softmax(kappa pi); 0 outside."""
    top = tl.full(inside.shape, LOWEST, tl.float32)
    total, index = tl.zeros(inside.shape, tl.float32), tl.full(inside.shape, 0, tl.int32)
    for c in range(C):
        pi = tl.load(line + c * groups, mask=inside, other=0.0).to(tl.float32)
        highest = tl.maximum(top, pi, propagate_nan=tl.PropagateNan.ALL)
        index = tl.where(pi > top, c, index)
        total = total * exp((top - highest) * kappa) + exp((pi - highest) * kappa)
        top = highest
    return index.to(tl.uint8), tl.where(inside, 1.0 / total, 0.0)


@triton.jit(do_not_specialize=(*CHANGING, "programs", "kappa"))
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
    codes,
    C: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """As gumbel_softmax_triton.forward."""
    squares = tl.zeros((ROWS, COLS), tl.float32)
    largest = tl.zeros((ROWS, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        line = logits + o * C * groups + g
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        if HARD:
            masks = _hard(line, inside, codes, named, slope, noise_scale, NOISE, C, M, groups)
        else:
            _, _, masks = _soft(line, inside, codes, named, slope, noise_scale, NOISE, C, M, groups)
        squares += mask_positions(masked, weight, masks, o, g, inside, groups, M, BITS)
        if STATISTICS:
            index, probability = _statistics(line, inside, kappa, C, groups)
            tl.store(hard_codes + o * groups + g, index, mask=inside)
            largest += probability
    tl.store(sums + tl.program_id(0), tl.sum(squares))
    tl.store(sums + programs + tl.program_id(0), tl.sum(largest))


@triton.jit(do_not_specialize=(*CHANGING, "norm_coef"))
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
    codes,
    C: tl.constexpr,
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
        line, out = logits + o * C * groups + g, dlogits + o * C * groups + g
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        top, total, soft = _soft(
            line, inside, codes, named, slope, noise_scale, NOISE, C, M, groups
        )
        masks = (
            _hard(line, inside, codes, named, slope, noise_scale, NOISE, C, M, groups)
            if HARD
            else soft
        )
        dmasks = mask_gradients(
            grad, weight, masks, norm_coef, o, g, inside, groups, M, BITS, GRAD_BITS
        )
        mean = tl.zeros((ROWS, COLS), tl.float32)  # sum_c y dy, which is sum_j soft dmask
        for j in tl.static_range(M):
            mean += soft[j] * dmasks[j]
        for block in range((C + 3) // 4):
            scores, _ = _block_scores(
                line, inside, named, block, slope, noise_scale, NOISE, C, groups
            )
            for i in tl.static_range(4):
                c, code, dy = (
                    block * 4 + i,
                    tl.load(codes + block * 4 + i),
                    tl.zeros((ROWS, COLS), tl.float32),
                )
                for j in tl.static_range(M):
                    dy += tl.where((code >> j) & 1 != 0, dmasks[j], 0.0)
                result = slope * (exp(scores[i] - top) / total) * (dy - mean)
                there = tl.where(inside, C, 0) > c
                if ADD:
                    result += tl.load(out + c * groups, mask=there, other=0.0).to(tl.float32)
                tl.store(out + c * groups, rounded(result, dlogits.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=("rows", "kappa"))
def mask_statistics(
    hard_codes,
    sums,
    logits,
    rows: tl.int32,
    groups: tl.int32,
    kappa,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """As gumbel_softmax_triton.mask_statistics."""
    largest = tl.zeros((ROWS, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        index, probability = _statistics(logits + o * C * groups + g, inside, kappa, C, groups)
        tl.store(hard_codes + o * groups + g, index, mask=inside)
        largest += probability
    tl.store(sums + tl.program_id(0), tl.sum(largest))
