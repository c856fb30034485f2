"""Fused sampling of the relaxed categorical for Triton: one pass over logits and weights, noise made in registers.

Every tensor of a program is a (ROWS, COLS) tile with one element per group, so nothing is exchanged between threads except the sums.
The M weights of a group travel as one or a few integer words (a 2:4 group in bf16 is one 64-bit word); logits are read along G.
Candidates are unrolled: TABLE is the candidate table as one integer, bit c * M + j set where candidate c keeps member j.

Shapes: O rows, G groups per row, C candidates, M group size, I = G * M.
"""

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Arguments that must not make Triton compile again when they change.
CHANGING = ("rows", "global_row", "first_group", "groups_in_row", "seed", "step", "parameter", "micro_batch", "slope", "inverse_tau")

# The hardware's own log2 and exp, approximate to 2^-22, where there is hardware.
_HARDWARE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def _log2(x):
    return libdevice.fast_log2f(x) if _HARDWARE else tl.log2(x)


@triton.jit
def exp(x):
    return libdevice.fast_expf(x) if _HARDWARE else tl.exp(x)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 to fp32 or bf16, to nearest even. The interpreter of Triton 3.6 to 3.9 cuts digits off instead."""
    if _HARDWARE or dtype == tl.float32:
        return value.to(dtype)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def tile(index, rows, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows (ROWS, 1) int64 and groups (1, COLS) of a tile, and which of them exist."""
    across: tl.constexpr = (GROUPS + COLS - 1) // COLS
    o = (index // across) * ROWS + tl.arange(0, ROWS)[:, None]
    g = (index % across) * COLS + tl.arange(0, COLS)[None, :]
    return o.to(tl.int64), g, (o < rows) & (g < GROUPS)


@triton.jit
def read_logits(logits, o, g, inside, GROUPS: tl.constexpr, C: tl.constexpr):
    """C tensors of fp32 logits."""
    pis = ()
    line = logits + o * C * GROUPS + g
    for c in tl.static_range(C):
        pis = pis + (tl.load(line + c * GROUPS, mask=inside, other=0.0).to(tl.float32),)
    return pis


@triton.jit
def _read_members(words, o, g, inside, GROUPS: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr):
    """M fp32 tensors, the members of every group; a member has BITS bits: 16 (bf16) or 32 (fp32)."""
    width: tl.constexpr = words.dtype.element_ty.primitive_bitwidth
    count: tl.constexpr = M * BITS // width
    members = ()
    line = words + (o * GROUPS + g) * count
    for k in tl.static_range(count):
        word = tl.load(line + k, mask=inside, other=0)
        for i in tl.static_range(width // BITS):
            bits = (word >> (BITS * i)).to(tl.uint32)
            if BITS == 16:
                bits = bits << 16
            members = members + (bits.to(tl.float32, bitcast=True),)
    return members


@triton.jit
def _write_members(words, members, o, g, inside, GROUPS: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr):
    """The inverse of _read_members; bf16 is rounded to nearest even."""
    kind: tl.constexpr = words.dtype.element_ty
    width: tl.constexpr = kind.primitive_bitwidth
    count: tl.constexpr = M * BITS // width
    line = words + (o * GROUPS + g) * count
    for k in tl.static_range(count):
        word = _bits(members[k * (width // BITS)], BITS).to(kind)
        for i in tl.static_range(1, width // BITS):
            word = word | (_bits(members[k * (width // BITS) + i], BITS).to(kind) << (BITS * i))
        tl.store(line + k, word, mask=inside)


@triton.jit
def _bits(value, BITS: tl.constexpr):
    if BITS == 16:
        return rounded(value, tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        return value.to(tl.uint32, bitcast=True)


@triton.jit
def counter(group, parameter, micro_batch, seed, step):
    """What names the words of each int64 group id but the word block, as uint32: philox.py has the layout."""
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32) << 8
    return low, high, parameter.to(tl.uint32), micro_batch.to(tl.uint32), seed.to(tl.uint32), step.to(tl.uint32)


@triton.jit
def word_block(named, block):
    """Words 4 block .. 4 block + 3."""
    low, high, parameter, micro_batch, seed, step = named
    return _philox(low, high | block, parameter, micro_batch, seed, step)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10. tl.philox gives the same words; it multiplies twice, for the high and for the low half."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def score_of(pi, word, slope, inverse_tau):
    """(kappa pi + g) / tau of one candidate, with g = -log(-log u) of the uniform u of the word.

    The hardware's log2 errs by up to 2^-22 absolute near 1, where log u itself is that small: there the series of log(1 - v) takes over.
    """
    u = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-24)  # (23 high bits + 1/2) / 2^23, exact
    v = 1 - u  # exact
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5)))))  # the next term is 2^-20 / 6 of it at most
    waiting = tl.where(v < 0.0625, series, _log2(u) * -0.6931471805599453)
    return pi * slope - _log2(waiting) * (inverse_tau * 0.6931471805599453)


@triton.jit
def scores_of(pis, named, slope, inverse_tau, C: tl.constexpr):
    """(kappa pi + g) / tau of C logits a group, with slope = kappa / tau."""
    words = ()
    for block in tl.static_range((C + 3) // 4):
        words = words + word_block(named, block)
    scores = ()
    for c in tl.static_range(C):
        scores = scores + (score_of(pis[c], words[c], slope, inverse_tau),)
    return scores


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
def _winner(values, C: tl.constexpr):
    """Index of the first largest value."""
    best, index = values[0], tl.zeros_like(values[0]).to(tl.int32)
    for c in tl.static_range(1, C):
        index = tl.where(values[c] > best, c, index)
        best = tl.maximum(best, values[c])
    return index


@triton.jit
def _one_hot(scores, top, C: tl.constexpr):
    """1 at the winner, 0 elsewhere; NaN in a group with a score that is NaN or infinite, as in _softmax."""
    index = _winner(scores, C)
    y = ()
    for c in tl.static_range(C):
        y = y + (tl.where(index == c, 1.0, 0.0) + (top - top),)
    return y


@triton.jit
def _member_masks(y, C: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr):
    """M tensors: the weighted average of the candidates (MaskLLM, Eq. 7), summed in candidate order."""
    masks = ()
    for j in tl.static_range(M):
        mask = tl.zeros_like(y[0])
        for c in tl.static_range(C):
            if (TABLE >> (c * M + j)) & 1:
                mask = mask + y[c]
        masks = masks + (mask,)
    return masks


@triton.jit
def mask_members(masked, weight, masks, o, g, inside, GROUPS: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr):
    """Write weight * mask; return the sum of its squares over the members of each group."""
    members = _read_members(weight, o, g, inside, GROUPS, M, BITS)
    results, squares = (), tl.zeros(inside.shape, tl.float32)
    for j in tl.static_range(M):
        results = results + (members[j] * masks[j],)
        squares += results[j] * results[j]
    _write_members(masked, results, o, g, inside, GROUPS, M, BITS)
    return squares


@triton.jit
def mask_gradients(
    grad, weight, masks, norm_coef, o, g, inside, GROUPS: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, GRAD_BITS: tl.constexpr
):
    """M tensors: the gradient at the mask entries."""
    members = _read_members(weight, o, g, inside, GROUPS, M, BITS)
    grads = _read_members(grad, o, g, inside, GROUPS, M, GRAD_BITS)
    dmasks = ()
    for j in tl.static_range(M):
        dmasks = dmasks + (grads[j] * members[j] - 2 * norm_coef * members[j] * members[j] * masks[j],)
    return dmasks


@triton.jit
def _candidate_sum(values, c: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr):
    """Sum of a group's values over the members that candidate c keeps."""
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
    masked, winner, sums, logits, weight, rows: tl.int32, programs: tl.int32,
    global_row: tl.int64, first_group: tl.int64, groups_in_row: tl.int64,
    seed: tl.uint32, step: tl.uint32, parameter: tl.uint32, micro_batch: tl.uint32, slope, inverse_tau, kappa,
    C: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr, BITS: tl.constexpr, HARD: tl.constexpr, WATCH: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """masked = weight * sampled mask; sums (2, programs) = this program's sum of squares and, with WATCH, of largest probabilities."""
    squares = tl.zeros((ROWS, COLS), tl.float32)
    largest = tl.zeros((ROWS, COLS), tl.float32)
    for t in range(TILES):
        o, g, inside = tile(tl.program_id(0) * TILES + t, rows, GROUPS, ROWS, COLS)
        pis = read_logits(logits, o, g, inside, GROUPS, C)
        named = counter((global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step)
        scores = scores_of(pis, named, slope, inverse_tau, C)
        top = _largest(scores, C)
        y = _one_hot(scores, top, C) if HARD else _softmax(scores, top, C)
        masks = _member_masks(y, C, M, TABLE)
        squares += mask_members(masked, weight, masks, o, g, inside, GROUPS, M, BITS)
        if WATCH:
            tl.store(winner + o * GROUPS + g, _winner(pis, C).to(tl.uint8), mask=inside)
            largest += tl.where(inside, _largest_probability(pis, kappa, C), 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(squares))
    tl.store(sums + programs + tl.program_id(0), tl.sum(largest))


@triton.jit(do_not_specialize=CHANGING + ("norm_coef",))
def backward(
    dlogits, grad, logits, weight, rows: tl.int32,
    global_row: tl.int64, first_group: tl.int64, groups_in_row: tl.int64,
    seed: tl.uint32, step: tl.uint32, parameter: tl.uint32, micro_batch: tl.uint32, slope, inverse_tau, norm_coef,
    C: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr, BITS: tl.constexpr, GRAD_BITS: tl.constexpr, HARD: tl.constexpr,
    ADD: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dlogits (+)= the gradient at the logits of grad, the gradient at weight * mask, minus norm_coef * |weight * mask|^2."""
    for t in range(TILES):
        o, g, inside = tile(tl.program_id(0) * TILES + t, rows, GROUPS, ROWS, COLS)
        pis = read_logits(logits, o, g, inside, GROUPS, C)
        named = counter((global_row + o) * groups_in_row + first_group + g, parameter, micro_batch, seed, step)
        scores = scores_of(pis, named, slope, inverse_tau, C)
        top = _largest(scores, C)
        y = _softmax(scores, top, C)
        masks = _member_masks(_one_hot(scores, top, C) if HARD else y, C, M, TABLE)
        dmasks = mask_gradients(grad, weight, masks, norm_coef, o, g, inside, GROUPS, M, BITS, GRAD_BITS)
        mean = tl.zeros_like(top)
        for c in tl.static_range(C):
            mean += y[c] * _candidate_sum(dmasks, c, M, TABLE)
        line = dlogits + o * C * GROUPS + g
        for c in tl.static_range(C):
            result = slope * y[c] * (_candidate_sum(dmasks, c, M, TABLE) - mean)
            if ADD:
                result += tl.load(line + c * GROUPS, mask=inside, other=0.0).to(tl.float32)
            tl.store(line + c * GROUPS, rounded(result, dlogits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "kappa"))
def survey(
    winner, sums, logits, rows: tl.int32, kappa,
    C: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """winner = argmax over candidates; sums (programs,) of the largest probabilities without noise."""
    largest = tl.zeros((ROWS, COLS), tl.float32)
    for t in range(TILES):
        o, g, inside = tile(tl.program_id(0) * TILES + t, rows, GROUPS, ROWS, COLS)
        pis = read_logits(logits, o, g, inside, GROUPS, C)
        tl.store(winner + o * GROUPS + g, _winner(pis, C).to(tl.uint8), mask=inside)
        largest += tl.where(inside, _largest_probability(pis, kappa, C), 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(largest))
