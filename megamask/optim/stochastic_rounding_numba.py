"""CPU kernels of the update rules with stochastic rounding: one pass over logits, gradients and
state, with the same bits as the PyTorch updates in adamw_bf16.py, lion.py and lion_8bit.py.

A kernel runs on one thread, without the GIL, on a slice of the rows. Floats are passed as raw bits:
uint16 for bf16, uint32 for fp32. All kernels have the arguments

    logits (O, C, G), grad (O, C, G), the state tensors of the rule,
    place = (global id of the first row, global id of the first column group, groups in a whole row)
    key = (seed, step, micro-batch, parameter), uint64
    numbers = the numbers of the rule and then the clip factor, fp32

and update logits and state in place.

Shapes: O rows, C logits of a group, G groups per row, B blocks of ``BLOCK`` groups per row (the
last block may be shorter).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from megamask.sparsity.kernels.numba_math import U32, U64, F, bits_of, fill_words, float_of

BLOCK = 8  # as in lion_8bit.py


@njit(inline="always")
def _read(bits, is_fp32):
    """The fp32 value of fp32 or bf16 bits."""
    return float_of(U32(bits)) if is_fp32 else float_of(U32(bits) << U32(16))


@njit(inline="always")
def _rounded(value, noise):
    """bf16 bits of ``value``, rounded away from zero with the probability of the part that is cut
    off. ``noise`` has 16 random bits. NaN stays NaN: with all bits set it would overflow to -0.
    """
    return U32(0x7FC0) if value != value else (bits_of(value) + noise) >> U32(16)


@njit(inline="always")
def _write(logits, at, value, noise, is_fp32):
    """Store a logit, rounded by the low half of ``noise`` if logits are bf16."""
    if is_fp32:
        logits[at] = bits_of(value)
    else:
        logits[at] = _rounded(value, noise & U32(0xFFFF))


@njit(inline="always")
def _word_buffer(candidates, groups):
    """Space for the random words of a row. Philox makes four words at a time."""
    return np.empty((4 * ((candidates + 3) // 4), groups), np.uint32)


@njit(inline="always")
def _fill_row(word, place, o, groups, key):
    """Fill ``word`` with the random words of row ``o``."""
    fill_words(word, U64(place[0] + o) * U64(place[2]) + U64(place[1]), groups, key)


# ---- AdamW


@njit(nogil=True, cache=True, error_model="numpy")
def adamw(logits, grad, mean, square, place, key, numbers):
    """``adamw_update``. ``mean`` and ``square`` are (O, C, G) bf16; numbers = (rate / (1 -
    beta1^t), rate decay, beta1, 1 - beta1, beta2, 1 - beta2, 1 / sqrt(1 - beta2^t), eps, clip
    factor).
    """
    rate, decay, beta1, rest1, beta2, rest2, root, eps, clip = numbers
    rows, candidates, groups = logits.shape
    is_fp32, is_fp32_grad = logits.itemsize == 4, grad.itemsize == 4
    word = _word_buffer(candidates, groups)
    for o in range(rows):
        _fill_row(word, place, o, groups, key)
        for c in range(candidates):
            for g in range(groups):
                slope = _read(grad[o, c, g], is_fp32_grad) * clip
                p = _read(logits[o, c, g], is_fp32)
                noise = word[c, g]
                m = beta1 * _read(mean[o, c, g], False) + rest1 * slope
                v = beta2 * _read(square[o, c, g], False) + rest2 * (slope * slope)
                moved = p - (rate * (m / (np.sqrt(v) * root + eps)) + decay * p)
                _write(logits, (o, c, g), moved, noise, is_fp32)
                mean[o, c, g] = _rounded(m, noise >> U32(16))
                square[o, c, g] = _rounded(v, (noise ^ (noise >> U32(16))) & U32(0xFFFF))


# ---- Lion


@njit(inline="always")
def _moved(p, m, g, rate, decay, beta1, rest1):
    """p - rate (sign(beta1 m + rest1 g) + decay p)."""
    u = beta1 * m + rest1 * g
    s = F(1) if u > F(0) else (F(-1) if u < F(0) else F(0))
    return p - rate * (s + decay * p)


@njit(nogil=True, cache=True)
def lion(logits, grad, momentum, place, key, numbers):
    """``lion_update``. ``momentum`` is (O, C, G) bf16; numbers = (rate, decay, beta1, 1 - beta1,
    beta2, 1 - beta2, clip factor).
    """
    rate, decay, beta1, rest1, beta2, rest2, clip = numbers
    rows, candidates, groups = logits.shape
    is_fp32, is_fp32_grad = logits.itemsize == 4, grad.itemsize == 4
    word = _word_buffer(candidates, groups)
    for o in range(rows):
        _fill_row(word, place, o, groups, key)
        for c in range(candidates):
            for g in range(groups):
                slope = _read(grad[o, c, g], is_fp32_grad) * clip
                p, m = _read(logits[o, c, g], is_fp32), _read(momentum[o, c, g], False)
                moved = _moved(p, m, slope, rate, decay, beta1, rest1)
                _write(logits, (o, c, g), moved, word[c, g], is_fp32)
                momentum[o, c, g] = _rounded(beta2 * m + rest2 * slope, word[c, g] >> U32(16))


# ---- Lion with 8-bit momentum


@njit(inline="always")
def _exponent(largest):
    """Biased exponent of the smallest power of two, in units of which ``largest`` is at most 127
    (1.984375 * 2^6).
    """
    bits = bits_of(largest)
    exponent = np.int32(bits >> U32(23)) - np.int32(6)
    if bits & U32(0x7FFFFF) > U32(0x7E0000):
        exponent += np.int32(1)
    return max(exponent, np.int32(1))


@njit(inline="always")
def _choose_exponents(exponent_B, top, groups):
    """Fill ``exponent_B`` from the largest momentum ``top`` (G,) of each group. Then ``top`` holds
    the inverse of the unit 2^(exponent - 127) of each group.
    """
    for b in range(exponent_B.size):
        last = min((b + 1) * BLOCK, groups)
        largest = F(0)
        for g in range(b * BLOCK, last):
            largest = max(largest, top[g])
        exponent = _exponent(largest)
        exponent_B[b] = exponent
        for g in range(b * BLOCK, last):
            top[g] = float_of(U32(np.int32(254) - exponent) << U32(23))


@njit(nogil=True, cache=True)
def lion8bit(logits, grad, codes, exponents, place, key, numbers):
    """``lion8bit_update``. The momentum is codes (O, C, G) int8 times 2^(exponents - 127), with
    exponents (O, B) uint8; numbers as in ``lion``.
    """
    rate, decay, beta1, rest1, beta2, rest2, clip = numbers
    rows, candidates, groups = logits.shape
    is_fp32, is_fp32_grad = logits.itemsize == 4, grad.itemsize == 4
    word = _word_buffer(candidates, groups)
    fresh = np.empty((candidates, groups), np.float32)
    unit, top = np.empty(groups, np.float32), np.empty(groups, np.float32)
    for o in range(rows):
        _fill_row(word, place, o, groups, key)
        # unit of the old codes of each group
        for g in range(groups):
            unit[g] = float_of(U32(exponents[o, g // BLOCK]) << U32(23))
            top[g] = F(0)
        # new logits, and new momentum in fp32 with its largest value per group
        for c in range(candidates):
            for g in range(groups):
                slope = _read(grad[o, c, g], is_fp32_grad) * clip
                p, m = _read(logits[o, c, g], is_fp32), F(codes[o, c, g]) * unit[g]
                moved = _moved(p, m, slope, rate, decay, beta1, rest1)
                _write(logits, (o, c, g), moved, word[c, g], is_fp32)
                fresh[c, g] = beta2 * m + rest2 * slope
                top[g] = max(top[g], abs(fresh[c, g]))
        # new codes in units of the new exponents, rounded stochastically
        _choose_exponents(exponents[o], top, groups)
        for c in range(candidates):
            for g in range(groups):
                noise = (F(word[c, g] >> U32(16)) + F(0.5)) * F(2.0**-16)
                codes[o, c, g] = np.int8(np.floor(fresh[c, g] * top[g] + noise))
