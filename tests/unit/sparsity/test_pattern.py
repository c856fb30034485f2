"""Patterns against brute force over all 0/1 words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megamask.errors import ConfigError
from megamask.sparsity import look_up
from megamask.sparsity.pattern import Pattern
from tests.masks import is_valid
from tests.unit.sparsity.categorical.reference import candidate_table

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 5)]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_candidates_are_all_words_with_n_ones_in_order(n: int, m: int) -> None:
    pattern = Pattern(n, m)
    assert torch.equal(pattern.candidates(torch.float64), candidate_table(n, m))
    assert pattern.num_candidates == len(candidate_table(n, m))
    assert pattern.kept_positions == [
        tuple(row.nonzero().flatten().tolist()) for row in candidate_table(n, m)
    ]


def test_the_order_of_2_4_is_the_one_that_mask_files_hold() -> None:
    words = ["".join(str(int(bit)) for bit in row) for row in Pattern(2, 4).candidates()]
    assert words == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_index_and_mask_undo_each_other(n: int, m: int) -> None:
    pattern = Pattern(n, m)
    index = torch.arange(pattern.num_candidates).repeat(2, 1)
    mask = pattern.mask_of(index)
    assert mask.dtype == torch.bool
    assert is_valid(pattern, mask)
    assert torch.equal(pattern.index_of(mask), index)
    assert not torch.equal(pattern.mask_of(index.flip(-1)), mask)


SOME = [Pattern(*one) for one in (*PATTERNS, (1, 16), (1, 32), (8, 16), (3, 30), (4, 8, 2))]


@pytest.mark.parametrize("pattern", SOME, ids=str)
@pytest.mark.parametrize("piece", [3, 1 << 15])
def test_a_mask_is_made_of_integers_of_any_size(
    pattern: Pattern, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against groups that are written down one after another, of which a row has an odd number."""
    monkeypatch.setattr(look_up, "PIECE", piece)
    units, m = pattern.units, pattern.m
    kept = list(itertools.combinations(range(units.m), units.n))
    numbers = torch.randint(len(kept), (4, 11), generator=torch.Generator().manual_seed(0))
    numbers[0, 0], numbers[1, 1] = 0, len(kept) - 1
    expected = torch.tensor(
        [[at in kept[one] for one in row for at in range(units.m)] for row in numbers.tolist()]
    ).repeat_interleave(pattern.unit, 1)
    for dtype in (np.int64, np.int32, np.min_scalar_type(len(kept) - 1)):
        index = torch.from_numpy(numbers.numpy().astype(dtype))
        assert torch.equal(pattern.mask_of(index), expected)
        assert torch.equal(pattern.mask_of(index[1:2]), expected[1:2])
        assert torch.equal(pattern.mask_of(index[:, 2:7]), expected[:, 2 * m : 7 * m])
        assert pattern.mask_of(index[:0]).shape == (0, 11 * m)
    assert torch.equal(pattern.mask_of(numbers, torch.float32), expected.float())


@pytest.mark.parametrize(("n", "m"), [(8, 16), (3, 30), (16, 32), (32, 64), (63, 64)])
def test_candidates_without_a_table_are_in_the_same_order(n: int, m: int) -> None:
    pattern, some = Pattern(n, m), torch.arange(1000)
    last = pattern.num_candidates - 1
    index = torch.cat(
        [some.clamp(max=last), (last - some).clamp(min=0), torch.randint(last + 1, some.shape)]
    ).view(2, -1)
    mask = pattern.mask_of(index)
    assert is_valid(pattern, mask) and torch.equal(pattern.index_of(mask), index)
    first = itertools.islice(
        itertools.combinations(range(m), n), 1000
    )  # as the tables of small patterns are ordered
    for number, kept in enumerate(first):
        assert mask[0, number * m : (number + 1) * m].nonzero().flatten().tolist() == list(kept)


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (8, 16), (5, 17), (16, 32), (32, 64)])
def test_bits_spell_out_the_mask(n: int, m: int) -> None:
    pattern = Pattern(n, m)
    mask = pattern.best(torch.rand(3, 5 * m, generator=torch.Generator().manual_seed(m)))
    bits = pattern.bits_of(mask)
    assert bits.shape == (3, 5) and bits.dtype == pattern.bits_dtype()
    spelled = [[int(one) % 2**m for one in row] for row in bits]  # the highest bit may be the sign
    assert spelled == [
        [sum(int(bit) << place for place, bit in enumerate(group)) for group in row]
        for row in mask.unflatten(1, (-1, m)).int()
    ]
    index = pattern.index_of_bits(bits)
    assert np.array_equal(pattern.mask_of(torch.from_numpy(index.astype(np.int64))), mask)
    wrong = bits.clone()
    wrong[1, 2] ^= 1  # a kept position more or less
    with pytest.raises(ValueError, match=f"the mask is not {n}:{m}"):
        pattern.index_of_bits(wrong)
    if m % 8:
        wrong[1, 2] = bits[1, 2] | (1 << m)  # a position that the group does not have
        with pytest.raises(ValueError, match=f"the mask is not {n}:{m}"):
            pattern.index_of_bits(wrong)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32)])
def test_pieces_of_a_look_up_do_not_show(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are looked up some at a time, in rows of any length and memory of any order."""
    pattern = Pattern(n, m)
    scores = torch.randn(6, 14 * m, generator=torch.Generator().manual_seed(0))
    bits = pattern.bits_of(pattern.best(scores))
    expected = [int(pattern.index_of_bits(one.reshape(1))[0]) for one in bits.reshape(-1)]
    monkeypatch.setattr(look_up, "PIECE", 5)
    assert pattern.index_of_bits(bits).reshape(-1).tolist() == expected
    assert pattern.index_of_bits(bits.t()).T.reshape(-1).tolist() == expected
    assert pattern.index_of_bits(bits[:0]).shape == (0, 14)
    bits[-1, -1] ^= 1
    with pytest.raises(ValueError, match="the mask is not"):
        pattern.index_of_bits(bits)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (2, 5)])
def test_a_group_is_valid_when_it_keeps_n(n: int, m: int) -> None:
    pattern = Pattern(n, m)
    for bits in itertools.product((0, 1), repeat=m):
        assert is_valid(pattern, torch.tensor([bits])) == (sum(bits) == n)


def test_what_is_not_a_mask_is_not_valid() -> None:
    pattern = Pattern(2, 4)
    assert not is_valid(
        pattern, torch.tensor([[1.0, 1.0, 0.5, 0.0]])
    )  # not 0 or 1, although it rounds to a mask
    assert not is_valid(pattern, torch.tensor([[2, 0, 0, 0]]))
    assert not is_valid(pattern, torch.tensor([[1, 1, 0, 0, 1, 1]]))  # no whole number of groups
    with pytest.raises(ValueError, match="2:4"):
        pattern.index_of(torch.tensor([[1, 1, 1, 0]]))


def test_best_keeps_the_n_largest_and_the_earlier_of_equals() -> None:
    pattern, scores = Pattern(2, 4), torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    best, table = pattern.best(scores), candidate_table(2, 4)
    totals = torch.einsum("ogm,cm->ogc", scores.double().unflatten(1, (-1, 4)), table)
    assert torch.equal(pattern.index_of(best), totals.argmax(-1))
    assert pattern.best(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2-4", "", "a:b", "124", "2:65"])
def test_text_that_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        Pattern.parse(text)


def test_parse_and_print() -> None:
    assert Pattern.parse(" 2 : 4 ") == Pattern(2, 4)
    assert str(Pattern(4, 8)) == "4:8"
    assert Pattern(1, 4).density == 0.25


def test_rows_that_m_does_not_divide_and_patterns_with_too_many_candidates_are_refused() -> None:
    assert Pattern(2, 4).groups(12) == 3
    with pytest.raises(
        ConfigError, match=r"in_features of x, here 6 after splitting over parallel.tp=2"
    ):
        Pattern(2, 4).groups(6, "in_features of x", tp=2)
    with pytest.raises(ConfigError, match=r"12,870.* Set learn.method=subset"):
        Pattern(8, 16).candidates()
