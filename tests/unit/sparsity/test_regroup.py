"""The search for an order of channels, against plain loops and every division of eight channels."""

from __future__ import annotations

import itertools

import pytest
import torch

from megamask.sparsity.pattern import Pattern
from megamask.sparsity.regroup import _losses, _swaps, dealt, lost, regrouped

TWO_OF_FOUR = Pattern(2, 4)


def random_importance(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Channels of very different importance, as inputs of linears are."""
    draws = torch.Generator().manual_seed(seed)
    scale = torch.randn(channels, generator=draws).exp()
    return torch.randn(rows, channels, generator=draws).square() * scale


def plain_loss(importance_RC: torch.Tensor, pattern: Pattern) -> float:
    total = 0.0
    for row in importance_RC.tolist():
        for first in range(0, len(row), pattern.m):
            total += sum(sorted(row[first : first + pattern.m])[: pattern.m - pattern.n])
    return total


def test_lost_is_the_sum_of_the_smallest() -> None:
    for pattern in (TWO_OF_FOUR, Pattern(1, 4), Pattern(3, 4), Pattern(1, 2)):
        importance = random_importance(5, 8)
        # sums of 40 fp32 numbers
        assert lost(importance, pattern) == pytest.approx(plain_loss(importance, pattern), rel=1e-5)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Pattern(1, 4), Pattern(3, 4), Pattern(1, 2)])
def test_the_gain_of_a_swap_is_what_the_loss_falls_by(pattern: Pattern) -> None:
    importance = random_importance(7, 6 * pattern.m)
    order_GM = torch.randperm(6 * pattern.m, generator=torch.Generator().manual_seed(1))
    order_GM = order_GM.view(6, pattern.m)
    loss = _losses(importance, order_GM, pattern)
    before = plain_loss(importance[:, order_GM.flatten()], pattern)
    for one, other in itertools.combinations(range(6), 2):
        swapped = order_GM.clone()
        swapped[[one, other], 0] = order_GM[[other, one], 0]
        fall = before - plain_loss(importance[:, swapped.flatten()], pattern)
        gain = loss[one, one] + loss[other, other] - loss[one, other] - loss[other, one]
        assert float(gain) == pytest.approx(fall, abs=1e-5 * before)  # sums in fp32
    # Swaps of one round are disjoint, so their gains add up.
    partner = _swaps(loss)
    assert torch.equal(partner[partner], torch.arange(6)) and bool(
        (partner != torch.arange(6)).any()
    )
    gains = loss.diagonal() - loss[partner, torch.arange(6)]
    order_GM = order_GM.clone()
    order_GM[:, 0] = order_GM[partner, 0]
    after = plain_loss(importance[:, order_GM.flatten()], pattern)
    assert before - after == pytest.approx(float(gains.sum()), abs=1e-5 * before) and after < before


def test_channels_of_equal_rank_are_shared_out() -> None:
    importance = torch.tensor([9.0, 9, 9, 9, 1, 1, 1, 1]).expand(3, 8)
    assert lost(importance, TWO_OF_FOUR) == 3 * 20
    for order in (dealt(importance, TWO_OF_FOUR), regrouped(importance, TWO_OF_FOUR)):
        assert sorted(order.tolist()) == list(range(8))
        assert lost(importance[:, order], TWO_OF_FOUR) == 3 * 4


def test_the_search_comes_close_to_the_best_of_all_divisions() -> None:
    found, best, first = 0.0, 0.0, 0.0
    for seed in range(4):
        importance = random_importance(6, 8, seed)
        divisions = [
            torch.tensor([0, *rest, *sorted({*range(1, 8)} - {*rest})])
            for rest in itertools.combinations(range(1, 8), 3)
        ]
        best += min(lost(importance[:, one], TWO_OF_FOUR) for one in divisions)
        first += lost(importance, TWO_OF_FOUR)
        found += lost(importance[:, regrouped(importance, TWO_OF_FOUR)], TWO_OF_FOUR)
    # A search by swaps may end where no swap helps; here it loses a tenth of the gain at most.
    assert best <= found * (1 + 1e-6) and first - found > 0.9 * (first - best) > 0


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2)])
def test_an_order_is_a_permutation_that_loses_less_and_is_repeatable(pattern: Pattern) -> None:
    importance = random_importance(16, 32)
    order = regrouped(importance, pattern)
    assert sorted(order.tolist()) == list(range(32))
    swapped, cards = (
        lost(importance[:, one], pattern) for one in (order, regrouped(importance, pattern, 0))
    )
    assert swapped < cards <= lost(importance, pattern)
    assert torch.equal(order, regrouped(importance, pattern))
    groups = order.view(-1, pattern.m)
    assert torch.equal(groups, groups.sort(1).values) and torch.equal(
        groups[:, 0], groups[:, 0].sort().values
    )


def test_channels_stay_where_no_order_is_better() -> None:
    for importance in (torch.ones(3, 16), torch.zeros(3, 16), random_importance(3, 4)):
        assert regrouped(importance, TWO_OF_FOUR).tolist() == list(range(importance.shape[1]))
