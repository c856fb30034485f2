"""What the fused CUDA kernels of all distributions share: tiles of groups, raw bits, keyed noise,
scores, masking and its gradient.
"""

from __future__ import annotations

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors
import os
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice


class Kernels(NamedTuple):
    """The kernels of a distribution for one pattern.

    Attributes:
        forward, backward, mask_statistics: the kernels.
        constants: arguments of ``forward`` and ``backward`` that describe the pattern, by name.
        statistics_constants: the same of ``mask_statistics``.
        groups_a_thread: how many groups a thread of a big layer holds in registers at once. Four
            groups of 2:4 share the index arithmetic and are read as 128 bits. Wide groups leave
            registers for one only.
        threads_a_group: how many threads share a group.
    """

    forward: Any
    backward: Any
    mask_statistics: Any
    constants: dict[str, Any]
    statistics_constants: dict[str, Any]
    groups_a_thread: int = 1
    threads_a_group: int = 1

    @property
    def sharing(self) -> tuple[int, int]:
        """(groups_a_thread, threads_a_group)."""
        return self.groups_a_thread, self.threads_a_group


# Arguments that must not make Triton compile again when they change.
CHANGING = (
    "rows",
    "global_row",
    "first_group",
    "groups_in_row",
    "seed",
    "step",
    "parameter",
    "micro_batch",
    "slope",
    "noise_scale",
)


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
    """fp32 to fp32 or bf16, to nearest even. The interpreter of Triton 3.6 to 3.9 cuts digits off
    instead.
    """
    if _HARDWARE or dtype == tl.float32:
        return value.to(dtype)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        return (
            ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        )


@triton.jit
def first_tile(TILES: tl.constexpr, groups, COLS: tl.constexpr):
    """Row and column, in tiles, of the first of the TILES tiles of this program."""
    across = (groups + COLS - 1) // COLS
    index = tl.program_id(0) * TILES
    return index // across, index % across


@triton.jit
def next_tile(row, column, groups, COLS: tl.constexpr):
    """The tile to the right, or the first tile of the next row. The number of groups is no constant
    of the kernel, so a division here would be paid in every tile.
    """
    is_last = (column + 1) * COLS >= groups
    return row + is_last.to(tl.int32), tl.where(is_last, 0, column + 1)


@triton.jit
def tile(row, column, rows, groups, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows (ROWS, 1) int64 and groups (1, COLS) of a tile, and which of them exist."""
    o = row * ROWS + tl.arange(0, ROWS)[:, None]
    g = column * COLS + tl.arange(0, COLS)[None, :]
    return o.to(tl.int64), g, (o < rows) & (g < groups)


@triton.jit
def read_logits(logits, o, g, inside, groups, C: tl.constexpr):
    """C tensors of fp32 logits."""
    pis = ()
    line = logits + o * C * groups + g
    for c in tl.static_range(C):
        pis = pis + (tl.load(line + c * groups, mask=inside, other=0.0).to(tl.float32),)
    return pis


@triton.jit
def _read_positions(words, o, g, inside, groups, M: tl.constexpr, BITS: tl.constexpr):
    """M fp32 tensors, one for each position of a group; a number has BITS bits: 16 (bf16) or 32
    (fp32).
    """
    width: tl.constexpr = words.dtype.element_ty.primitive_bitwidth
    count: tl.constexpr = M * BITS // width
    positions = ()
    line = words + (o * groups + g) * count
    for k in tl.static_range(count):
        word = tl.load(line + k, mask=inside, other=0)
        for i in tl.static_range(width // BITS):
            bits = (word >> (BITS * i)).to(tl.uint32)
            if BITS == 16:
                bits = bits << 16
            positions = positions + (bits.to(tl.float32, bitcast=True),)
    return positions


@triton.jit
def _write_positions(words, positions, o, g, inside, groups, M: tl.constexpr, BITS: tl.constexpr):
    """The inverse of _read_positions; bf16 is rounded to nearest even."""
    kind: tl.constexpr = words.dtype.element_ty
    width: tl.constexpr = kind.primitive_bitwidth
    count: tl.constexpr = M * BITS // width
    line = words + (o * groups + g) * count
    for k in tl.static_range(count):
        word = _bits(positions[k * (width // BITS)], BITS).to(kind)
        for i in tl.static_range(1, width // BITS):
            word = word | (_bits(positions[k * (width // BITS) + i], BITS).to(kind) << (BITS * i))
        tl.store(line + k, word, mask=inside)


@triton.jit
def _bits(value, BITS: tl.constexpr):
    if BITS == 16:
        return rounded(value, tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        return value.to(tl.uint32, bitcast=True)


@triton.jit
def counter(group, parameter, micro_batch, seed, step):
    """The Philox counter and key of each int64 group id, without the word block, as uint32;
    noise.py has the layout.
    """
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32) << 8
    return (
        low,
        high,
        parameter.to(tl.uint32),
        micro_batch.to(tl.uint32),
        seed.to(tl.uint32),
        step.to(tl.uint32),
    )


@triton.jit
def word_block(named, block):
    """Words 4 block .. 4 block + 3."""
    low, high, parameter, micro_batch, seed, step = named
    return _philox(low, high | block, parameter, micro_batch, seed, step)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10. tl.philox gives the same words; it multiplies twice, for the high and for the
    low half.
    """
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
def score_of(pi, word, slope, noise_scale):
    """(kappa pi + noise g) / tau of one candidate, with g = -log(-log u) of the uniform u of the
    word.

    The hardware's log2 errs by up to 2^-22 absolute near 1, where log u itself is that small: there
    the series of log(1 - v) takes over.
    """
    u = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (
        1 - 2.0**-24
    )  # (23 high bits + 1/2) / 2^23, exact
    v = 1 - u  # exact
    series = tl.fma(v, tl.fma(v, 1 / 5, 1 / 4), 1 / 3)
    series = v * tl.fma(v, tl.fma(v, series, 1 / 2), 1.0)  # the next: 2^-20 / 6 of it at most
    waiting = tl.where(v < 0.0625, series, _log2(u) * -0.6931471805599453)
    return tl.fma(pi, slope, -_log2(waiting) * (noise_scale * 0.6931471805599453))


@triton.jit
def scores_of(pis, named, slope, noise_scale, NOISE: tl.constexpr, C: tl.constexpr, first_block=0):
    """(kappa pi + noise g) / tau of C logits a group, with slope = kappa / tau and noise_scale =
    noise / tau. Without NOISE, for noise 0, no word and no logarithm is computed. ``first_block``
    is a fourth of the number of the first logit in its group.
    """
    scores = ()
    if NOISE:
        words = ()
        for block in tl.static_range((C + 3) // 4):
            words = words + word_block(named, first_block + block)
        for c in tl.static_range(C):
            scores = scores + (score_of(pis[c], words[c], slope, noise_scale),)
    else:
        for c in tl.static_range(C):
            scores = scores + (pis[c] * slope,)
    return scores


@triton.jit
def mask_positions(
    masked, weight, masks, o, g, inside, groups, M: tl.constexpr, BITS: tl.constexpr
):
    """Write weight * mask; return the sum of its squares over the positions of each group."""
    positions = _read_positions(weight, o, g, inside, groups, M, BITS)
    results, squares = (), tl.zeros(inside.shape, tl.float32)
    for j in tl.static_range(M):
        results = results + (positions[j] * masks[j],)
        squares = tl.fma(results[j], results[j], squares)
    _write_positions(masked, results, o, g, inside, groups, M, BITS)
    return squares


@triton.jit
def mask_gradients(
    grad,
    weight,
    masks,
    norm_coef,
    o,
    g,
    inside,
    groups,
    M: tl.constexpr,
    BITS: tl.constexpr,
    GRAD_BITS: tl.constexpr,
):
    """M tensors: the gradient at the mask entries."""
    positions = _read_positions(weight, o, g, inside, groups, M, BITS)
    grads = _read_positions(grad, o, g, inside, groups, M, GRAD_BITS)
    dmasks = ()
    for j in tl.static_range(M):
        dmasks = dmasks + (
            positions[j] * tl.fma(-2 * norm_coef * positions[j], masks[j], grads[j]),
        )
    return dmasks
