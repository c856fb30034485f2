"""Indices in nearly log2(C) bits each, for any number C of candidates up to 2**61.

``digits`` indices are joined to a number in base C. Its lowest ``low_bits`` bits are stored as they
are; ``per_field`` of the remaining high parts are joined to a number in base ``radix``, and that is
a field of ``field_bits`` bits. 2:4 needs no low bits: 17 indices take 44 bits, 0.647 bit a weight,
where log2(6) / 4 is 0.646. Fields and low bits follow each other without gaps in words of 64 bits,
lowest bit first: all fields, padded with zeros to a word, then all low bits, padded likewise.
Indices beyond the last are zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from megamask.masks.codec import Words

WORD = 64  # bits
CLOSE = 0.0025  # a layout without low bits that wastes less is taken, because it is faster
BYTE_DIGITS = 7  # digits of a byte each in an entry of the table
TABLE = 2**16  # entries at most
SMALL = 256  # candidates whose index fits in a byte

Index = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Layout:
    """How indices below ``base`` become fields; see the module.

    Attributes:
        base: C, the number of candidates.
        digits: indices that are joined to a number.
        low_bits: bits of a number that are stored as they are.
        per_field: numbers whose high parts are joined to a field.
        field_bits: bits of a field.
    """

    base: int
    digits: int
    low_bits: int
    per_field: int
    field_bits: int

    @property
    def radix(self) -> int:
        """High parts are below it."""
        return -(-(self.base**self.digits) // 2**self.low_bits)

    @property
    def bits(self) -> float:
        """Bits that an index takes."""
        return (self.low_bits + self.field_bits / self.per_field) / self.digits

    def numbers(self, count: int) -> int:
        """Joined numbers of ``count`` indices."""
        return -(-count // self.digits)

    def sizes(self, count: int) -> tuple[int, int]:
        """Words of the fields and of the low bits of ``count`` indices."""
        numbers = self.numbers(count)
        fields = -(-numbers // self.per_field)
        return -(-fields * self.field_bits // WORD), -(-numbers * self.low_bits // WORD)


@cache
def layout(base: int) -> Layout:
    """The layout for ``base`` candidates, a part of the format: the one without low bits that
    wastes the least, the one of the most indices among equals, or, where it wastes more than
    ``CLOSE``, the one of all layouts that wastes the least, with the fewest indices among equals.
    """
    most = 1
    while base ** (most + 1) <= 2**WORD:
        most += 1
    plain = [Layout(base, d, 0, 1, _bits(base**d)) for d in range(1, most + 1)]
    best = min(plain, key=lambda one: (one.bits, -one.digits))
    if best.bits <= math.log2(base) * (1 + CLOSE):
        return best
    found = plain
    for digits in range(1, most + 1):
        for low in range(_bits(base**digits)):
            radix = -(-(base**digits) // 2**low)
            per_field = 1
            while radix ** (per_field + 1) <= 2**WORD and per_field < WORD:
                per_field += 1
            found += [
                Layout(base, digits, low, count, _bits(radix**count))
                for count in range(1, per_field + 1)
            ]
    return min(found, key=lambda one: (one.bits, one.digits, one.per_field, one.low_bits))


def _bits(numbers: int) -> int:
    """Bits that tell ``numbers`` numbers apart, at least 1."""
    return max((numbers - 1).bit_length(), 1)


def num_words(count: int, base: int) -> int:
    """Number of words for ``count`` indices."""
    return sum(layout(base).sizes(count))


def pack(index: Index, base: int) -> Words:
    """The words of indices (count,), each in [0, base)."""
    from megamask.masks.radix_numba import write_fields

    used = layout(base)
    size, rest = used.sizes(len(index))
    words = np.zeros(size + rest, dtype=np.uint64)
    write_fields(_typed(index, base), words[:size], words[size:], *_numbers(used))
    return words


def unpack(words: Words, count: int, base: int) -> Index:
    """The first ``count`` indices of ``words``, (count,): bytes for up to 256 candidates, or
    uint64.

    Raises:
        ValueError: the number of words is wrong, or ``pack`` cannot have written a word.
    """
    from megamask.masks.radix_numba import read_fields

    used = layout(base)
    size, rest = used.sizes(count)
    if words.shape != (size + rest,):
        raise ValueError(f"{words.size} words, expected {size + rest}")
    dtype = np.uint8 if base <= SMALL else np.uint64
    index = np.empty(used.numbers(count) * used.digits, dtype=dtype)
    table, step = _table(base)
    power = np.uint64(base**step)
    words = np.ascontiguousarray(words, dtype=np.uint64)
    is_whole = read_fields(
        words[:size], words[size:], index, *_numbers(used), table, step, power
    )  # fmt: skip
    if not is_whole or index[count:].any() or _padding(words, used, count):
        raise ValueError(f"digits out of range for {base} candidates")
    return index[:count]


def _padding(words: Words, used: Layout, count: int) -> bool:
    """Whether a bit is set behind the last field or behind the last low bit."""
    numbers = used.numbers(count)
    ends = ((-(-numbers // used.per_field)) * used.field_bits, numbers * used.low_bits)
    first = 0
    for size, end in zip(used.sizes(count), ends, strict=True):
        used_bits = end % WORD
        if size and used_bits and int(words[first + size - 1]) >> used_bits:
            return True
        first += size
    return False


def _typed(index: Index, base: int) -> Index:
    """The indices in one of the two types that the kernels are compiled for."""
    return np.ascontiguousarray(index, dtype=np.uint8 if base <= SMALL else np.uint64)


def _numbers(used: Layout) -> tuple[np.uint64, int, int, int, int, np.uint64]:
    radix = used.radix if used.per_field > 1 else 0  # a single part is never divided
    return (
        *(np.uint64(used.base), used.digits, used.low_bits),
        *(used.per_field, used.field_bits, np.uint64(radix)),
    )


@cache
def _table(base: int) -> tuple[Words, int]:
    """The digits of every number below base ** step, a byte each, and ``step``; see the kernel."""
    step = 0
    while base ** (step + 1) <= TABLE and step < BYTE_DIGITS and base <= SMALL:
        step += 1
    if step < 2:
        return np.empty(0, dtype=np.uint64), 1
    left, entries = np.arange(base**step, dtype=np.uint64), np.zeros(base**step, dtype=np.uint64)
    for place in range(step):
        left, digit = np.divmod(left, np.uint64(base))
        entries |= digit << np.uint64(8 * place)
    return entries, step
