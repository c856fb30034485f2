"""CPU kernels of ``radix``: digits <-> bit fields. A kernel runs on one thread, without the GIL."""

from __future__ import annotations

import numpy as np
from numba import njit

U64 = np.uint64


@njit(inline="always")
def _put(words, at, value, bits):
    """Write a field at bit ``at``; the words were 0 there."""
    word, shift = at >> 6, at & 63
    words[word] |= value << U64(shift)
    if shift + bits > 64:
        words[word + 1] |= value >> U64(64 - shift)


@njit(inline="always")
def _get(words, at, bits):
    """Read a field at bit ``at``. ``bits`` is 1 to 64."""
    word, shift = at >> 6, at & 63
    value = words[word] >> U64(shift)
    if shift + bits > 64:
        value |= words[word + 1] << U64(64 - shift)
    return value & (~U64(0) >> U64(64 - bits))


@njit(nogil=True, cache=True, error_model="numpy")
def write_fields(index, high, low, base, digits, low_bits, per_field, field_bits, radix):
    """The words of indices.

    Args:
        index: (count,) unsigned, each below ``base``.
        high, low: zeroed words of the fields and of the low bits.
        base, digits, low_bits, per_field, field_bits, radix: see ``radix.Layout``.
    """
    numbers = -(-len(index) // digits)
    mask = (U64(1) << U64(low_bits)) - U64(1)
    for field in range(-(-numbers // per_field)):
        first = field * per_field
        value = U64(0)
        for number in range(min(first + per_field, numbers) - 1, first - 1, -1):
            joined = U64(0)
            for place in range(min((number + 1) * digits, len(index)) - 1, number * digits - 1, -1):
                joined = joined * base + U64(index[place])
            if low_bits:
                _put(low, number * low_bits, joined & mask, low_bits)
            value = value * radix + (joined >> U64(low_bits))
        _put(high, field * field_bits, value, field_bits)


@njit(nogil=True, cache=True, error_model="numpy")
def read_fields(
    high, low, index, base, digits, low_bits, per_field, field_bits, radix, table, step, power
):
    """The inverse of ``write_fields``.

    Args:
        high, low: the words.
        index: (numbers * digits,) unsigned, filled.
        base, digits, low_bits, per_field, field_bits, radix: see ``radix.Layout``.
        table: the ``step`` digits of every number below ``power`` = base ** step, each in a byte of
            an entry, the first in the lowest; empty where digits are divided out one by one.
        step, power: of the table.

    Returns:
        Whether every field is one that ``write_fields`` could have written.
    """
    numbers = len(index) // digits
    is_whole = True
    for field in range(-(-numbers // per_field)):
        value = _get(high, field * field_bits, field_bits)
        first = field * per_field
        for number in range(first, min(first + per_field, numbers)):
            joined = value
            if per_field > 1:
                rest = value // radix
                joined = value - rest * radix
                value = rest
            else:
                value = U64(0)
            if low_bits:
                joined = joined << U64(low_bits) | _get(low, number * low_bits, low_bits)
            at, left = number * digits, digits
            if len(table):
                while left > 0:
                    taken = min(step, left)
                    rest = joined // power
                    entry = table[joined - rest * power]
                    joined = rest
                    for place in range(taken):
                        index[at + place] = (entry >> U64(8 * place)) & U64(255)
                    at += taken
                    left -= taken
                    is_whole &= taken == step or entry >> U64(8 * taken) == U64(0)
            else:
                for place in range(left):
                    rest = joined // base
                    index[at + place] = joined - rest * base
                    joined = rest
            is_whole &= joined == U64(0)
        is_whole &= value == U64(0)
    return is_whole
