"""Masks and borders of groups from whole columns of positions, against sorting each group."""

from __future__ import annotations

import pytest
import torch

from megamask.sparsity import by_position
from megamask.sparsity.by_position import best_of_groups, border, columns, pieces
from megamask.sparsity.masking import zero_outside

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def sorted_groups(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The mask of the n largest, ties to the earlier position, NaN first: a loop over groups."""
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for groups, kept in zip(score.reshape(-1, m), mask.view(-1, m), strict=True):
        numbers = [float("inf") if x != x else x for x in groups.tolist()]
        is_nan = groups.isnan().tolist()
        order = sorted(range(m), key=lambda j: (-numbers[j], not is_nan[j], j))
        kept[order[:n]] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_comparisons_give_the_mask_of_a_sort(
    n: int, m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_position, "MANY", 0)
    monkeypatch.setattr(by_position, "PIECE", 7 * 6 * m)  # several pieces, the last one shorter
    score = torch.randn(20, 6 * m, generator=torch.Generator().manual_seed(m)).to(dtype)
    rounded = score.round()  # many ties
    rounded[:, ::3] *= -0.0  # zeros of both signs are equal
    infinite = score.masked_fill(score > 1, torch.inf)
    for one in (score, rounded, infinite, score.t().contiguous().t(), score.view(4, 5, 6 * m)):
        mask = best_of_groups(one, n, m)
        assert torch.equal(mask, sorted_groups(one, n, m))
        assert torch.equal(mask, by_position._by_sorting(one, n, m))
        assert not torch.equal(mask, sorted_groups(-one, n, m))


def test_a_group_with_nan_still_keeps_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_position, "MANY", 0)
    score = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [torch.inf, 1.0, torch.nan, 5.0]])
    mask = best_of_groups(score, 2, 4)
    assert torch.equal(mask, sorted_groups(score, 2, 4))
    assert mask.tolist() == [[False, True, True, False], [True, False, True, False]]


@pytest.mark.parametrize("size", ["few", "many"])
def test_few_groups_are_sorted(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons of a few groups cost more calls than their sort."""
    calls = []

    def ranks(score_MOG: torch.Tensor) -> torch.Tensor:
        calls.append(score_MOG)
        return torch.zeros_like(score_MOG, dtype=torch.uint8)

    monkeypatch.setattr(by_position, "_ranks", ranks)
    monkeypatch.setattr(by_position, "MANY", 4)
    score = torch.rand(4, 4 * (3 if size == "few" else 4))
    best_of_groups(score, 2, 4)
    assert bool(calls) == (size == "many")


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (8, 16), (16, 32)])
def test_the_border_lies_between_the_nth_and_the_next(n: int, m: int) -> None:
    score = torch.randn(3, 5 * m, generator=torch.Generator().manual_seed(0))
    before = score.clone()
    last, following = border(columns(score, m), n)
    order = score.unflatten(-1, (-1, m)).sort(dim=-1, descending=True).values
    assert torch.equal(last, order[..., n - 1]) and torch.equal(following, order[..., n])
    assert torch.equal(score, before)


def test_pieces_cover_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_position, "PIECE", 1)
    for shape in ((5, 4), (0, 4), (3, 0)):
        rows = [row for piece in pieces(torch.empty(shape)) for row in range(shape[0])[piece]]
        assert rows == [*range(shape[0])]
    assert len([*pieces(torch.empty(5, 4))]) == 5
    assert len([*pieces(torch.empty(5, 4, device="meta"))]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_outside_a_mask_are_positive_zeros(dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 12, generator=draws).to(dtype)
    weight[0, :4] = torch.tensor([-0.0, torch.inf, torch.nan, -1.0])
    mask = torch.rand(16, 12, generator=draws) > 0.5
    for one, kept in ((weight, mask), (weight.t(), mask.t()), (weight, ~mask)):
        found, expected = zero_outside(one, kept), torch.where(kept, one, 0)
        assert found.dtype == dtype
        assert found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
