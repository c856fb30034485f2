"""CUDA kernels of the update rules with stochastic rounding: one pass over logits, gradients and
state, with the same bits as the PyTorch updates in adamw_bf16.py, lion.py and lion_8bit.py.

Every float operation is one IEEE operation in the order of these updates: the kernels must be
launched without fused multiply-adds, and root and quotient are the correctly rounded ones. One call
of Philox rounds four logits of a group.

All kernels have the arguments

    logits (O, C, G), grad (O, C, G), the state tensors of the rule
    clip: the clip factor, one fp32 number in the device's memory
    the numbers of the rule, fp32
    rows, candidates, groups = O, C, G
    global_row = global number of local row 0; after each block_rows rows, gap rows are left out
    first_group = global number of column group 0; groups_in_row = groups in a whole row
    seed, step, parameter, micro_batch = the noise key

and update logits and state in place. Logits and gradients are fp32 or bf16. No number but the
divisibility of G and of addresses by 16 makes Triton compile again.

Shapes: O rows, C logits of a group, G groups per row, B blocks of ``BLOCK`` groups per row (the
last block may be shorter).
"""

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors
import triton
import triton.language as tl

from megamask.sparsity.kernels.triton_tiles import counter, word_block

BLOCK = tl.constexpr(8)  # as in lion_8bit.py

# Arguments that must not make Triton compile again when they change; of ``clip``, the address.
CHANGING = (
    "clip",
    *("rate", "decay", "beta1", "rest1", "beta2", "rest2", "root", "eps"),
    *("rows", "candidates", "global_row", "block_rows", "gap", "first_group", "groups_in_row"),
    *("seed", "step", "parameter", "micro_batch"),
)


@triton.jit
def _tile(index, rows, groups, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows (ROWS, 1) and groups (1, COLS) of a tile by its number, and which of them exist."""
    across = (groups + COLS - 1) // COLS
    o = index // across * ROWS + tl.arange(0, ROWS)[:, None]
    g = index % across * COLS + tl.arange(0, COLS)[None, :]
    return o, g, (o < rows) & (g < groups)


@triton.jit
def _ids(o, g, global_row, block_rows, gap, first_group, groups_in_row):
    """Global ids of groups, int64."""
    row = global_row + o + (o // block_rows) * gap
    return row * groups_in_row + first_group + g


@triton.jit
def _fp32(value):
    """fp32 of bf16 or fp32, exact. The interpreter's own cast spoils numbers below 2^-126."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value


@triton.jit
def _rounded(value, noise):
    """bf16 of fp32 ``value``, rounded away from zero with the probability of the part that is cut
    off. ``noise`` has 16 random bits. NaN stays NaN: its bits, all ones on this hardware, would
    overflow to -0.
    """
    bits = (value.to(tl.uint32, bitcast=True) + noise) >> 16
    bits = tl.where(value == value, bits, 0x7FC0)
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _store_logits(pointers, value, noise, inside):
    """Store logits, rounded by the low half of ``noise`` if they are bf16."""
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, _rounded(value, noise & 0xFFFF), mask=inside)
    else:
        tl.store(pointers, value, mask=inside)


# ---- AdamW


@triton.jit(do_not_specialize=CHANGING)
def adamw(
    logits,
    grad,
    mean,
    square,
    clip,
    rate,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    rows: tl.int32,
    candidates: tl.int32,
    groups: tl.int32,
    global_row: tl.int64,
    block_rows: tl.int32,
    gap: tl.int64,
    first_group: tl.int64,
    groups_in_row: tl.int64,
    seed: tl.uint32,
    step: tl.uint32,
    parameter: tl.uint32,
    micro_batch: tl.uint32,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``adamw_update``. ``mean`` and ``square`` are (O, C, G) bf16; rate = rate / (1 - beta1^t),
    decay = rate decay, root = 1 / sqrt(1 - beta2^t). A program has four logits of each group.
    """
    blocks = (candidates + 3) // 4
    block, factor = tl.program_id(0) % blocks, tl.load(clip)
    o, g, inside = _tile(tl.program_id(0) // blocks, rows, groups, ROWS, COLS)
    ids = _ids(o, g, global_row, block_rows, gap, first_group, groups_in_row)
    words = word_block(counter(ids, parameter, micro_batch, seed, step), block)
    first = (o.to(tl.int64) * candidates + 4 * block) * groups + g
    # all loads before the first store, which they could not pass
    slopes, values, means, squares = (), (), (), ()
    for i in tl.static_range(4):
        at, here = first + i * groups, inside & (4 * block + i < candidates)
        slopes = slopes + (tl.load(grad + at, mask=here, other=0.0),)
        values = values + (tl.load(logits + at, mask=here, other=0.0),)
        means = means + (tl.load(mean + at, mask=here, other=0.0),)
        squares = squares + (tl.load(square + at, mask=here, other=0.0),)
    for i in tl.static_range(4):
        if 4 * block + i < candidates:
            at, noise = first + i * groups, words[i]
            slope, p = _fp32(slopes[i]) * factor, _fp32(values[i])
            m = beta1 * _fp32(means[i]) + rest1 * slope
            v = beta2 * _fp32(squares[i]) + rest2 * (slope * slope)
            moved = p - (rate * tl.div_rn(m, tl.sqrt_rn(v) * root + eps) + decay * p)
            _store_logits(logits + at, moved, noise, inside)
            tl.store(mean + at, _rounded(m, noise >> 16), mask=inside)
            tl.store(square + at, _rounded(v, (noise ^ (noise >> 16)) & 0xFFFF), mask=inside)


# ---- Lion


@triton.jit
def _moved(p, m, slope, rate, decay, beta1, rest1):
    """p - rate (sign(beta1 m + rest1 slope) + decay p)."""
    u = beta1 * m + rest1 * slope
    sign = tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0))
    return p - rate * (sign + decay * p)


@triton.jit(do_not_specialize=CHANGING)
def lion(
    logits,
    grad,
    momentum,
    clip,
    rate,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    rows: tl.int32,
    candidates: tl.int32,
    groups: tl.int32,
    global_row: tl.int64,
    block_rows: tl.int32,
    gap: tl.int64,
    first_group: tl.int64,
    groups_in_row: tl.int64,
    seed: tl.uint32,
    step: tl.uint32,
    parameter: tl.uint32,
    micro_batch: tl.uint32,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``lion_update``. ``momentum`` is (O, C, G) bf16. A program has four logits of each group."""
    blocks = (candidates + 3) // 4
    block, factor = tl.program_id(0) % blocks, tl.load(clip)
    o, g, inside = _tile(tl.program_id(0) // blocks, rows, groups, ROWS, COLS)
    ids = _ids(o, g, global_row, block_rows, gap, first_group, groups_in_row)
    words = word_block(counter(ids, parameter, micro_batch, seed, step), block)
    first = (o.to(tl.int64) * candidates + 4 * block) * groups + g
    slopes, values, moments = (), (), ()
    for i in tl.static_range(4):
        at, here = first + i * groups, inside & (4 * block + i < candidates)
        slopes = slopes + (tl.load(grad + at, mask=here, other=0.0),)
        values = values + (tl.load(logits + at, mask=here, other=0.0),)
        moments = moments + (tl.load(momentum + at, mask=here, other=0.0),)
    for i in tl.static_range(4):
        if 4 * block + i < candidates:
            at, m = first + i * groups, _fp32(moments[i])
            slope, p = _fp32(slopes[i]) * factor, _fp32(values[i])
            moved = _moved(p, m, slope, rate, decay, beta1, rest1)
            _store_logits(logits + at, moved, words[i], inside)
            fresh = beta2 * m + rest2 * slope
            tl.store(momentum + at, _rounded(fresh, words[i] >> 16), mask=inside)


# ---- Lion with 8-bit momentum


@triton.jit
def _power(biased):
    """2^(biased - 127), exact."""
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def _size(value):
    """The bits of abs(value), int32: they have the order of the numbers, with NaN above all."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _code(fresh, inverse, word):
    """int8 code of a momentum in units of 1 / ``inverse``, rounded by the high half of ``word``."""
    noise = ((word >> 16).to(tl.int32).to(tl.float32) + 0.5) * 0.0000152587890625  # 2^-16
    return tl.floor(fresh * inverse + noise).to(tl.int32).to(tl.int8)


@triton.jit
def _new_exponents(exponents, top, o, rows, groups, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store the biased exponents of the smallest powers of two, in units of which the momenta of a
    block are at most 127 (1.984375 * 2^6). ``top`` (ROWS, COLS) holds the ``_size`` of the largest
    of each group. Returns the inverse of the unit of each group.
    """
    bits = tl.max(tl.reshape(top, (ROWS, COLS // BLOCK, BLOCK)), 2)
    exponent = (bits >> 23) - 6 + ((bits & 0x7FFFFF) > 0x7E0000).to(tl.int32)
    exponent = tl.maximum(exponent, 1)
    count = (groups + BLOCK - 1) // BLOCK
    first = tl.program_id(0) % ((groups + COLS - 1) // COLS) * (COLS // BLOCK)
    b = first + tl.arange(0, COLS // BLOCK)[None, :]
    at = exponents + o.to(tl.int64) * count + b
    tl.store(at, exponent.to(tl.uint8), mask=(o < rows) & (b < count))
    inverse = _power(254 - exponent)[:, :, None]
    return tl.reshape(tl.broadcast_to(inverse, (ROWS, COLS // BLOCK, BLOCK)), (ROWS, COLS))


@triton.jit(do_not_specialize=CHANGING)
def lion8bit(
    logits,
    grad,
    codes,
    exponents,
    clip,
    rate,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    rows: tl.int32,
    candidates: tl.int32,
    groups: tl.int32,
    global_row: tl.int64,
    block_rows: tl.int32,
    gap: tl.int64,
    first_group: tl.int64,
    groups_in_row: tl.int64,
    seed: tl.uint32,
    step: tl.uint32,
    parameter: tl.uint32,
    micro_batch: tl.uint32,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``lion8bit_update``. The momentum is codes (O, C, G) int8 times 2^(exponents - 127), with
    exponents (O, B) uint8. A program has all logits of each group: C of them in registers, or, with
    C = 0, any number, whose gradients and codes it reads once more.
    """
    o, g, inside = _tile(tl.program_id(0), rows, groups, ROWS, COLS)
    ids = _ids(o, g, global_row, block_rows, gap, first_group, groups_in_row)
    named, factor = counter(ids, parameter, micro_batch, seed, step), tl.load(clip)
    wide = o.to(tl.int64)
    first = wide * candidates * groups + g
    of_group = exponents + wide * ((groups + BLOCK - 1) // BLOCK) + g // BLOCK
    unit = _power(tl.load(of_group, mask=inside, other=0).to(tl.int32))
    top = tl.zeros((ROWS, COLS), tl.int32)
    if C > 0:
        slopes, values, moments, words = (), (), (), ()
        for c in tl.static_range(C):
            at = first + c * groups
            slopes = slopes + (tl.load(grad + at, mask=inside, other=0.0),)
            values = values + (tl.load(logits + at, mask=inside, other=0.0),)
            moments = moments + (tl.load(codes + at, mask=inside, other=0),)
        for block in tl.static_range((C + 3) // 4):
            words = words + word_block(named, block)
        fresh = ()
        for c in tl.static_range(C):
            slope, m = _fp32(slopes[c]) * factor, moments[c].to(tl.float32) * unit
            moved = _moved(_fp32(values[c]), m, slope, rate, decay, beta1, rest1)
            _store_logits(logits + first + c * groups, moved, words[c], inside)
            fresh = fresh + (beta2 * m + rest2 * slope,)
            top = tl.maximum(top, _size(fresh[c]))
        inverse = _new_exponents(exponents, top, o, rows, groups, ROWS, COLS)
        for c in tl.static_range(C):
            code = _code(fresh[c], inverse, words[c])
            tl.store(codes + first + c * groups, code, mask=inside)
    else:
        blocks = (candidates + 3) // 4
        for block in range(blocks):
            words = word_block(named, block)
            for i in tl.static_range(4):
                at, here = first + (4 * block + i) * groups, inside & (4 * block + i < candidates)
                slope = _fp32(tl.load(grad + at, mask=here, other=0.0)) * factor
                m = tl.load(codes + at, mask=here, other=0).to(tl.float32) * unit
                p = _fp32(tl.load(logits + at, mask=here, other=0.0))
                moved = _moved(p, m, slope, rate, decay, beta1, rest1)
                _store_logits(logits + at, moved, words[i], here)
                top = tl.maximum(top, _size(beta2 * m + rest2 * slope))
        inverse = _new_exponents(exponents, top, o, rows, groups, ROWS, COLS)
        for block in range(blocks):
            words = word_block(named, block)
            for i in tl.static_range(4):
                at, here = first + (4 * block + i) * groups, inside & (4 * block + i < candidates)
                slope = _fp32(tl.load(grad + at, mask=here, other=0.0)) * factor
                m = tl.load(codes + at, mask=here, other=0).to(tl.float32) * unit
                code = _code(beta2 * m + rest2 * slope, inverse, words[i])
                tl.store(codes + at, code, mask=here)
