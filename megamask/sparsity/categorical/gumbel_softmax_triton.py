"""Fused sampling of the relaxed categorical for Triton: one pass over logits and weights, noise
made in registers.

Every tensor of a program is a (ROWS, COLS) tile with one element per group, so nothing is exchanged
between threads except the sums. The M weights of a group travel as one or a few integer words (a
2:4 group in bf16 is one 64-bit word); logits are read along G.
Candidates are unrolled: TABLE is the candidate table as one integer, bit c * M + j set where
candidate c keeps position j.

Shapes: O rows, G groups per row, C candidates, M group size, I = G * M.
"""

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from megamask.sparsity.categorical import gumbel_softmax_looped_triton
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

# Up to so many candidates, the kernels hold all of a group in registers; compiling them takes
# quadratic time.
UNROLLED = 32
FEW = 8  # up to so many candidates, a thread has registers for four groups


def kernels_of(pattern: Pattern, device: torch.device) -> Kernels:
    """The kernels for this pattern: of this file, or those that loop over many candidates."""
    if pattern.num_candidates > UNROLLED:
        return gumbel_softmax_looped_triton.kernels_of(pattern, device)
    candidates = {"C": pattern.num_candidates}
    codes = [sum(1 << j for j in kept) for kept in pattern.kept_positions]
    table = sum(code << (c * pattern.m) for c, code in enumerate(codes))
    constants = {**candidates, "M": pattern.m, "TABLE": table}
    several = 4 if pattern.num_candidates <= FEW else 1
    return Kernels(forward, backward, mask_statistics, constants, candidates, several)


@triton.jit
def _largest(values, C: tl.constexpr):
    top = values[0]
    for c in tl.static_range(1, C):
        top = tl.maximum(top, values[c], propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def _softmax(scores, top, C: tl.constexpr):
    """exp(score - top) over its sum; the sum in candidate order."""
    powers = ()
    for c in tl.static_range(C):
        powers = powers + (exp(scores[c] - top),)
    total = powers[0]
    for c in tl.static_range(1, C):
        total = total + powers[c]
    y = ()
    for c in tl.static_range(C):
        y = y + (powers[c] * (1.0 / total),)
    return y


@triton.jit
def _hard_code(values, C: tl.constexpr):
    """Index of the first largest value."""
    best, index = values[0], tl.zeros_like(values[0]).to(tl.int32)
    for c in tl.static_range(1, C):
        index = tl.where(values[c] > best, c, index)
        best = tl.maximum(best, values[c])
    return index


@triton.jit
def _one_hot(scores, top, C: tl.constexpr):
    """1 at the first largest score, 0 elsewhere; NaN in a group with a score that is NaN or
    infinite, as in _softmax.
    """
    index = _hard_code(scores, C)
    y = ()
    for c in tl.static_range(C):
        y = y + (tl.where(index == c, 1.0, 0.0) + (top - top),)
    return y


@triton.jit
def _position_masks(y, C: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr):
    """M tensors: the weighted average of the candidates (MaskLLM, Eq. 7), summed in candidate
    order.
    """
    masks = ()
    for j in tl.static_range(M):
        mask = tl.zeros_like(y[0])
        for c in tl.static_range(C):
            if (TABLE >> (c * M + j)) & 1:
                mask = mask + y[c]
        masks = masks + (mask,)
    return masks


@triton.jit
def _candidate_sum(values, c: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr):
    """Sum of a group's values over the positions that candidate c keeps."""
    total = tl.zeros_like(values[0])
    for j in tl.static_range(M):
        if (TABLE >> (c * M + j)) & 1:
            total = total + values[j]
    return total


@triton.jit
def _largest_probability(pis, kappa, C: tl.constexpr):
    """max softmax(kappa pi)."""
    top = _largest(pis, C)
    total = exp((pis[0] - top) * kappa)
    for c in tl.static_range(1, C):
        total = total + exp((pis[c] - top) * kappa)
    return 1.0 / total


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
    C: tl.constexpr,
    M: tl.constexpr,
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """masked = weight * sampled mask; sums (2, programs) = this program's sum of squares and, with
    STATISTICS, of largest probabilities.
    """
    squares = tl.zeros((ROWS, COLS), tl.float32)
    largest = tl.zeros((ROWS, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, o, g, inside, groups, C)
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        scores = scores_of(pis, named, slope, noise_scale, NOISE, C)
        top = _largest(scores, C)
        y = _one_hot(scores, top, C) if HARD else _softmax(scores, top, C)
        masks = _position_masks(y, C, M, TABLE)
        squares += mask_positions(masked, weight, masks, o, g, inside, groups, M, BITS)
        if STATISTICS:
            tl.store(hard_codes + o * groups + g, _hard_code(pis, C).to(tl.uint8), mask=inside)
            largest += tl.where(inside, _largest_probability(pis, kappa, C), 0.0)
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
    C: tl.constexpr,
    M: tl.constexpr,
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    GRAD_BITS: tl.constexpr,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILES: tl.constexpr,
):
    """dlogits (+)= the gradient at the logits of grad, the gradient at weight * mask, minus
    norm_coef * |weight * mask|^2.
    """
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, o, g, inside, groups, C)
        named = counter(
            (global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step
        )
        scores = scores_of(pis, named, slope, noise_scale, NOISE, C)
        top = _largest(scores, C)
        y = _softmax(scores, top, C)
        masks = _position_masks(_one_hot(scores, top, C) if HARD else y, C, M, TABLE)
        dmasks = mask_gradients(
            grad, weight, masks, norm_coef, o, g, inside, groups, M, BITS, GRAD_BITS
        )
        mean = tl.zeros_like(top)
        for c in tl.static_range(C):
            mean += y[c] * _candidate_sum(dmasks, c, M, TABLE)
        line = dlogits + o * C * groups + g
        for c in tl.static_range(C):
            result = slope * y[c] * (_candidate_sum(dmasks, c, M, TABLE) - mean)
            if ADD:
                result += tl.load(line + c * groups, mask=inside, other=0.0).to(tl.float32)
            tl.store(line + c * groups, rounded(result, dlogits.dtype.element_ty), mask=inside)


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
    """hard_codes = argmax over candidates; sums (programs,) of the largest probabilities without
    noise.
    """
    largest = tl.zeros((ROWS, COLS), tl.float32)
    row, column = first_tile(TILES, groups, COLS)
    for _number in range(TILES):
        o, g, inside = tile(row, column, rows, groups, ROWS, COLS)
        row, column = next_tile(row, column, groups, COLS)
        pis = read_logits(logits, o, g, inside, groups, C)
        tl.store(hard_codes + o * groups + g, _hard_code(pis, C).to(tl.uint8), mask=inside)
        largest += tl.where(inside, _largest_probability(pis, kappa, C), 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(largest))
