"""Candidate indices packed into 64-bit words.

An index is a digit in base C, the number of candidates, and a word holds as many digits as fit:
0.667 bit per weight at 2:4, 1 bit at 8:16. The first index is the least significant digit. Digits
beyond the last index are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megamask.sparsity.look_up import look_up, padded, smallest_dtype

Words = npt.NDArray[np.uint64]
BLOCK = 1 << 15  # words that are packed at a time, so that numbers beside the codes stay few
SPLIT = 1 << 12  # words that are unpacked at a time: all of their numbers stay in the cache


def digits_per_word(base: int) -> int:
    """The largest d with base**d <= 2**64."""
    digits = 1
    while base ** (digits + 1) <= 2**64:
        digits += 1
    return digits


def num_words(count: int, base: int) -> int:
    """Number of words for ``count`` indices."""
    return -(-count // digits_per_word(base))


def pack(codes: Any, base: int, index_of: Callable[[Any], Any] | None = None) -> Words:
    """The words of indices, in row-major order, a block of them at a time.

    Args:
        codes: an array or a tensor on the CPU, of any shape: indices, each in [0, base), or what
            ``index_of`` makes indices of.
        base: number of candidates.
        index_of: the indices of some codes.

    Raises:
        ValueError: an index is not in [0, base).
    """
    flat, digits = codes.reshape(-1), digits_per_word(base)
    words = np.zeros(num_words(len(flat), base), dtype=np.uint64)
    for first in range(0, len(words), BLOCK):
        block = words[first : first + BLOCK]
        part = flat[first * digits : (first + BLOCK) * digits]
        index = np.asarray(part if index_of is None else index_of(part))
        if (index.dtype.kind != "u" and index.min() < 0) or index.max() >= base:
            raise ValueError(f"digits out of range for {base} candidates")
        if len(index) < len(block) * digits:
            index = np.concatenate([index, np.zeros(len(block) * digits - len(index), index.dtype)])
        index = np.ascontiguousarray(index, dtype=_digit(base))
        _add_digits(block, index.reshape(len(block), digits), base)
    return words


def _add_digits(words: Words, digits: npt.NDArray[np.unsignedinteger], base: int) -> None:
    """Make ``words``, which are 0, of their digits, (words, digits), least significant first.

    While the number of digits is even, two neighbours, read as one number of twice the bits, become
    a digit in base ** 2, which fits there: the work halves, and all of it is on contiguous memory.
    """
    bits = 8 * digits.itemsize
    while digits.shape[1] % 2 == 0 and bits < 64:
        both = digits.view(f"<u{bits // 4}")
        wide = both.dtype.type
        digits = both >> wide(bits)
        digits *= wide(base)
        digits += both & wide(2**bits - 1)
        bits, base = 2 * bits, base * base
    words += digits[:, -1]
    for place in reversed(range(digits.shape[1] - 1)):
        words *= np.uint64(base)
        words += digits[:, place]


def unpack(words: Words, count: int, base: int) -> npt.NDArray[np.unsignedinteger]:
    """The first ``count`` indices of ``words``, (count,), in the smallest type that holds them.

    Raises:
        ValueError: the number of words is wrong, or ``pack`` cannot have written a word.
    """
    if words.shape != (num_words(count, base),):
        raise ValueError(f"{words.size} words, expected {num_words(count, base)}")
    digits, together = digits_per_word(base), _together(base)
    index = np.empty((len(words), digits), dtype=_digit(base))
    wide, is_whole = np.uint64(base**together), True
    for first in range(0, len(words), SPLIT):
        left = words[first : first + SPLIT].astype(np.uint64)
        numbers = np.empty((len(left), digits // together), dtype=_digit(base**together))
        for place in range(numbers.shape[1] - 1):
            higher = left // wide  # no remainder: numpy divides many by one number without it
            numbers[:, place] = left - higher * wide
            left = higher
        is_whole &= bool(left.max() < wide)
        numbers[:, -1] = left
        if together > 1:
            numbers = look_up(_digits_of(base, together), numbers)
        index[first : first + SPLIT] = numbers.reshape(len(left), digits)
    flat = index.reshape(-1)
    if not is_whole or flat[count:].any():
        raise ValueError(f"digits out of range for {base} candidates")
    return flat[:count]


def _together(base: int) -> int:
    """How many digits ``unpack`` looks up together: as many as make a number of 16 bits, and divide
    the digits of a word.
    """
    digits = digits_per_word(base)
    found = (one for one in range(1, digits + 1) if digits % one == 0 and base**one <= 2**16)
    return max(found, default=1)


@cache
def _digits_of(base: int, together: int) -> npt.NDArray[np.unsignedinteger]:
    """The digits of all numbers of ``together`` digits, the least significant first."""
    left, digits = np.arange(base**together), np.empty((base**together, together), _digit(base))
    for place in range(together):
        left, digits[:, place] = np.divmod(left, base)
    return padded(digits, _digit(base**together))


def _digit(base: int) -> np.dtype[np.unsignedinteger]:
    return smallest_dtype(base - 1)
