"""Packing: exact for every number of candidates, and as dense as promised."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from megamask.masks import codec
from megamask.masks.codec import digits_per_word, num_words, pack, unpack
from megamask.sparsity.pattern import MAX_CANDIDATES

PATTERNS = [(n, m) for m in range(2, 17) for n in range(1, m) if math.comb(m, n) <= MAX_CANDIDATES]
LARGE = {math.comb(16, 8), 2**16 + 1, math.comb(32, 16), math.comb(64, 8), math.comb(64, 32)}
BASES = sorted({math.comb(m, n) for n, m in PATTERNS} | {2, 255, 256, 257} | LARGE)


@pytest.mark.parametrize("base", BASES)
def test_round_trip(base: int) -> None:
    rng = np.random.default_rng(base)
    digits = digits_per_word(base)
    for count in (1, digits - 1, digits, digits + 1, 10 * digits + 3):
        for index in (
            rng.integers(base, size=count),
            np.full(count, base - 1),
            np.zeros(count, dtype=int),
        ):
            words = pack(index, base)
            assert words.dtype == np.uint64 and words.shape == (num_words(count, base),)
            found = torch.from_numpy(unpack(words, count, base))  # as a mask file reads it
            assert np.array_equal(found.numpy(), index)


@pytest.mark.parametrize("base", [2, 6, 70, 256, math.comb(16, 8), math.comb(32, 16)])
def test_words_are_those_of_plain_arithmetic(base: int) -> None:
    """Independent reference: Python integers, first digit least significant."""
    index = np.random.default_rng(0).integers(base, size=100)
    digits = digits_per_word(base)
    assert base**digits <= 2**64 < base ** (digits + 1)
    expected = [
        sum(int(one) * base**place for place, one in enumerate(index[at : at + digits]))
        for at in range(0, 100, digits)
    ]
    assert [int(word) for word in pack(index, base)] == expected


@pytest.mark.parametrize("base", [2, 3, 6, 10, 15, 16, 70, 256, math.comb(16, 8)])
def test_blocks_and_codes_do_not_show(base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and indices that are looked up block by block."""
    index = np.random.default_rng(1).integers(base, size=(3, 7 * digits_per_word(base) + 1))
    whole = pack(index, base)
    monkeypatch.setattr(codec, "BLOCK", 4)
    sizes = []

    def index_of(codes: Any) -> Any:
        sizes.append(len(codes))
        return base - 1 - codes

    assert np.array_equal(pack(index, base), whole)
    assert np.array_equal(pack(base - 1 - index, base, index_of), whole)
    assert len(sizes) == -(-len(whole) // 4) and max(sizes) == 4 * digits_per_word(base)


@pytest.mark.parametrize("base", BASES)
def test_words_are_taken_apart_as_by_plain_division(
    base: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent reference: Python integers, a digit at a time; words in several blocks."""
    monkeypatch.setattr(codec, "SPLIT", 3)
    draw, digits = random.Random(base), digits_per_word(base)
    values = [0, base**digits - 1, *(draw.randrange(base**digits) for _ in range(5))]
    expected = [value // base**place % base for value in values for place in range(digits)]
    words = np.array(values, dtype=np.uint64)
    found = unpack(words, len(expected), base)
    assert found.dtype == np.min_scalar_type(base - 1) and found.tolist() == expected
    if base**digits == 2**64:
        return
    for place in range(len(words)):
        broken = words.copy()
        broken[place] = base**digits + draw.randrange(2**64 - base**digits)
        with pytest.raises(ValueError, match=f"out of range for {base}"):
            unpack(broken, len(expected), base)


@pytest.mark.parametrize("base", [6, 70, math.comb(16, 8)])
def test_an_index_out_of_range_is_refused(base: int) -> None:
    for wrong in (base, -1):
        with pytest.raises(ValueError, match=f"out of range for {base}"):
            pack(np.array([0, wrong, 1]), base)


def test_bits_per_weight_at_2_4() -> None:
    assert digits_per_word(6) == 24 and abs(64 / 24 / 4 - 2 / 3) < 1e-12


def test_words_that_pack_never_writes_are_refused() -> None:
    words = pack(np.zeros(30, dtype=int), 6)
    with pytest.raises(ValueError, match="words"):
        unpack(words[:1], 30, 6)
    too_large, tail = words.copy(), words.copy()
    too_large[0] = np.uint64(6**24)  # a 25th digit
    tail[1] = np.uint64(6**6)  # a 31st index
    for broken in (too_large, tail):
        with pytest.raises(ValueError, match="out of range"):
            unpack(broken, 30, 6)
    assert np.array_equal(unpack(words, 30, 6), np.zeros(30))
