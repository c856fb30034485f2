"""The updates of stochastic_rounding.py's optimizers in one pass over logits, gradients and state,
on the CPU; the same bits as their plain PyTorch.

A kernel runs on one thread without the GIL and gets a slice of the rows. Floats travel as raw bits:
uint16 for bf16, uint32 for fp32.

Shapes: O rows, C candidates, G groups per row, B blocks of ``BLOCK`` groups per row (the last one
may be shorter).
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from megamask.sparsity.kernels.numba_math import U32, U64, F, bits_of, fill_words, float_of

BLOCK = 8


@njit(inline="always")
def _read(bits, wide):  # type: ignore[no-untyped-def]
    return float_of(U32(bits)) if wide else float_of(U32(bits) << U32(16))


@njit(inline="always")
def _rounded(value, noise):  # type: ignore[no-untyped-def]
    """bf16 bits of ``value``, up with the probability of what is cut off; ``noise`` is 16 bits."""
    return (bits_of(value) + noise) >> U32(16)


@njit(inline="always")
def _write(logits, at, value, noise, wide):  # type: ignore[no-untyped-def]
    if wide:
        logits[at] = bits_of(value)
    else:
        logits[at] = _rounded(value, noise & U32(0xFFFF))


@njit(nogil=True, cache=True, error_model="numpy")
def adamw(logits, grad, mean, square, place, key, numbers):  # type: ignore[no-untyped-def]
    """Update logits (O, C, G), mean and square (O, C, G) bf16 in place.

    place = (global id of the first row, global id of the first column group, groups in a whole
    row); key = (seed, step, micro-batch, parameter); numbers = (rate / (1 - beta1^t), rate * decay,
    beta1, 1 - beta1, beta2, 1 - beta2, 1 / sqrt(1 - beta2^t), eps, clip factor), fp32.
    """
    rate, decay, beta1, rest1, beta2, rest2, root, eps, clip = numbers
    rows, candidates, groups = logits.shape
    wide, wide_grad = logits.itemsize == 4, grad.itemsize == 4
    word = np.empty((4 * ((candidates + 3) // 4), groups), np.uint32)
    for o in range(rows):
        fill_words(word, U64(place[0] + o) * U64(place[2]) + U64(place[1]), groups, key)
        for c in range(candidates):
            for g in range(groups):
                slope, p, noise = (
                    _read(grad[o, c, g], wide_grad) * clip,
                    _read(logits[o, c, g], wide),
                    word[c, g],
                )
                m = beta1 * _read(mean[o, c, g], False) + rest1 * slope
                v = beta2 * _read(square[o, c, g], False) + rest2 * (slope * slope)
                _write(
                    logits,
                    (o, c, g),
                    p - (rate * (m / (np.sqrt(v) * root + eps)) + decay * p),
                    noise,
                    wide,
                )
                mean[o, c, g] = _rounded(m, noise >> U32(16))
                square[o, c, g] = _rounded(v, (noise ^ (noise >> U32(16))) & U32(0xFFFF))


@njit(inline="always")
def _moved(p, m, g, rate, decay, beta1, rest1):  # type: ignore[no-untyped-def]
    """p - rate (sign(beta1 m + rest1 g) + decay p)."""
    u = beta1 * m + rest1 * g
    s = F(1) if u > F(0) else (F(-1) if u < F(0) else F(0))
    return p - rate * (s + decay * p)


@njit(nogil=True, cache=True)
def lion(logits, grad, momentum, place, key, numbers):  # type: ignore[no-untyped-def]
    """As ``adamw``, with one momentum (O, C, G) bf16; numbers = (rate, decay, beta1, 1 - beta1,
    beta2, 1 - beta2, clip factor), fp32.
    """
    rate, decay, beta1, rest1, beta2, rest2, clip = numbers
    rows, candidates, groups = logits.shape
    wide, wide_grad = logits.itemsize == 4, grad.itemsize == 4
    word = np.empty((4 * ((candidates + 3) // 4), groups), np.uint32)
    for o in range(rows):
        fill_words(word, U64(place[0] + o) * U64(place[2]) + U64(place[1]), groups, key)
        for c in range(candidates):
            for g in range(groups):
                slope = _read(grad[o, c, g], wide_grad) * clip
                m = _read(momentum[o, c, g], False)
                _write(
                    logits,
                    (o, c, g),
                    _moved(_read(logits[o, c, g], wide), m, slope, rate, decay, beta1, rest1),
                    word[c, g],
                    wide,
                )
                momentum[o, c, g] = _rounded(beta2 * m + rest2 * slope, word[c, g] >> U32(16))


@njit(inline="always")
def _exponent(largest):  # type: ignore[no-untyped-def]
    """Biased exponent of the smallest power of two that makes ``largest`` at most 127 (1.984375 *
    2^6) steps.
    """
    bits = bits_of(largest)
    exponent = np.int32(bits >> U32(23)) - np.int32(6)
    if bits & U32(0x7FFFFF) > U32(0x7E0000):
        exponent += np.int32(1)
    return max(exponent, np.int32(1))


@njit(inline="always")
def _choose_exponents(exponent_B, top, groups):  # type: ignore[no-untyped-def]
    """Fill ``exponent_B`` from the largest values ``top`` (G,), which then holds the inverse of
    each group's step.
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
def lion8bit(logits, grad, codes, exponents, place, key, numbers):  # type: ignore[no-untyped-def]
    """As ``lion``, with momentum = codes (O, C, G) int8 * 2^(exponents (O, B) uint8 - 127)."""
    rate, decay, beta1, rest1, beta2, rest2, clip = numbers
    rows, candidates, groups = logits.shape
    wide, wide_grad = logits.itemsize == 4, grad.itemsize == 4
    word = np.empty((4 * ((candidates + 3) // 4), groups), np.uint32)
    fresh, unit, top = (
        np.empty((candidates, groups), np.float32),
        np.empty(groups, np.float32),
        np.empty(groups, np.float32),
    )
    for o in range(rows):
        fill_words(word, U64(place[0] + o) * U64(place[2]) + U64(place[1]), groups, key)
        for g in range(groups):
            unit[g] = float_of(U32(exponents[o, g // BLOCK]) << U32(23))
            top[g] = F(0)
        for c in range(candidates):
            for g in range(groups):
                slope = _read(grad[o, c, g], wide_grad) * clip
                m = F(codes[o, c, g]) * unit[g]
                _write(
                    logits,
                    (o, c, g),
                    _moved(_read(logits[o, c, g], wide), m, slope, rate, decay, beta1, rest1),
                    word[c, g],
                    wide,
                )
                fresh[c, g] = beta2 * m + rest2 * slope
                top[g] = max(top[g], abs(fresh[c, g]))
        _choose_exponents(exponents[o], top, groups)
        for c in range(candidates):
            for g in range(groups):
                noise = (F(word[c, g] >> U32(16)) + F(0.5)) * F(2.0**-16)
                codes[o, c, g] = np.int8(np.floor(fresh[c, g] * top[g] + noise))
