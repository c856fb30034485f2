"""Candidate indices packed into 64-bit words.

An index is a digit in base C, the number of candidates, and a word holds as many digits as fit:
0.667 bit per weight at 2:4, 1 bit at 8:16. The first index is the least significant digit. Digits
beyond the last index are zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


def digits_per_word(base: int) -> int:
    """The largest d with base**d <= 2**64."""
    digits = 1
    while base ** (digits + 1) <= 2**64:
        digits += 1
    return digits


def num_words(count: int, base: int) -> int:
    """Number of words for ``count`` indices."""
    return -(-count // digits_per_word(base))


def pack(index: npt.NDArray[np.integer], base: int) -> Words:
    """The words of the indices (any shape, each in [0, base)), in row-major order."""
    digits = digits_per_word(base)
    padded = np.zeros((num_words(index.size, base), digits), dtype=_digit(base))
    padded.reshape(-1)[: index.size] = index.reshape(-1)
    words = np.zeros(len(padded), dtype=np.uint64)
    for digit in reversed(range(digits)):
        words *= np.uint64(base)
        words += padded[:, digit]
    return words


def unpack(words: Words, count: int, base: int) -> npt.NDArray[np.unsignedinteger]:
    """The first ``count`` indices of ``words``, (count,), in the smallest type that holds them.

    Raises:
        ValueError: the number of words is wrong, or ``pack`` cannot have written a word.
    """
    if words.shape != (num_words(count, base),):
        raise ValueError(f"{words.size} words, expected {num_words(count, base)}")
    digits = digits_per_word(base)
    index = np.empty((len(words), digits), dtype=_digit(base))
    left = words.astype(np.uint64)
    for digit in range(digits):
        left, index[:, digit] = np.divmod(left, np.uint64(base))
    flat = index.reshape(-1)
    if left.any() or flat[count:].any():
        raise ValueError(f"digits out of range for {base} candidates")
    return flat[:count]


def _digit(base: int) -> np.dtype[np.unsignedinteger]:
    return np.min_scalar_type(base - 1)
