"""The polish against exchanges that are tried out one by one on the error itself, in fp64."""

from __future__ import annotations

import pytest
import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criteria import CRITERIA, find_criterion
from megamask.oneshot.polish import ROWS, polish, scores
from megamask.oneshot.stats import InputStats, Statistics
from megamask.sparsity.pattern import Pattern
from tests.masks import is_valid
from tests.parallel.plain_oneshot import polish_by_trial
from tests.unit.oneshot.test_sparsegpt import example

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(5, 8), Pattern(4, 8, 2)]


def problem() -> tuple[torch.Tensor, InputStats]:
    weight_OI, _, stats = example(out=16, inp=40, tokens=60)
    return weight_OI, stats


def errors(weight_OI: torch.Tensor, mask_OI: torch.Tensor, gram_II: torch.Tensor) -> torch.Tensor:
    removed_OI = weight_OI.double() * ~mask_OI
    return ((removed_OI @ gram_II.double()) * removed_OI).sum(1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_equals_exchanges_by_trial(
    pattern: Pattern, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamask.oneshot.polish.BLOCK", 16)  # several blocks, the last one short
    weight_OI, stats = problem()
    before_OI, gram_II = pattern.best(weight_OI.abs()), stats.hessian_II
    given_OI = before_OI.clone()
    found_OI = polish(weight_OI, before_OI, gram_II, pattern, sweeps)
    assert torch.equal(before_OI, given_OI) and is_valid(pattern, found_OI)
    # fp32 here and fp64 there: no exchange of this seed gains so little that they disagree.
    shape = (pattern.m, sweeps, pattern.unit)
    expected_OI = polish_by_trial(weight_OI, before_OI, gram_II, *shape)
    assert torch.equal(found_OI, expected_OI) and not torch.equal(found_OI, before_OI)
    for wrong_II in (gram_II.diagonal().diag(), gram_II.flip(0)):
        wrong_OI = polish_by_trial(weight_OI, before_OI, wrong_II, *shape)
        assert not torch.equal(found_OI, wrong_OI)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_error_of_every_row_falls_with_every_sweep_and_ends(name: str) -> None:
    weight_OI, stats = problem()
    pattern, gram_II = Pattern(2, 4), stats.hessian_II
    mask_OI = CRITERIA[name].prune(weight_OI, Statistics(stats), pattern, PruneSection()).mask_OI
    first_O = error_O = errors(weight_OI, mask_OI, gram_II)
    for sweeps in range(1, 30):
        polished_OI = polish(weight_OI, mask_OI, gram_II, pattern, sweeps)
        now_O = errors(weight_OI, polished_OI, gram_II)
        assert (now_O <= error_O).all()
        if torch.equal(now_O, error_O):
            break
        error_O = now_O
    assert 1 < sweeps < 29  # it came to rest
    assert error_O.sum() < 0.9 * first_O.sum()
    # No exchange is left that would gain: the end is a minimum for single exchanges.
    again_OI = polish_by_trial(weight_OI, polished_OI, gram_II, 4, 1)
    assert torch.equal(again_OI, polished_OI)
    # The other sign of the slope finds exchanges that raise the error.
    assert errors(weight_OI, polish(weight_OI, mask_OI, -gram_II, pattern, 1), gram_II).sum() > (
        first_O.sum()
    )


def test_rows_do_not_interact_and_scale_does_not_matter() -> None:
    weight_OI, stats = problem()
    pattern, gram_II = Pattern(2, 4), stats.hessian_II
    mask_OI = pattern.best(weight_OI.abs())
    whole_OI = polish(weight_OI, mask_OI, gram_II, pattern, 3)
    parts = [
        polish(weight_OI[rows], mask_OI[rows], gram_II, pattern, 3)
        for rows in (slice(0, 1), slice(1, None))
    ]
    assert torch.equal(torch.cat(parts), whole_OI)
    # Factors of two are exact.
    assert torch.equal(polish(weight_OI * 4, mask_OI, gram_II / 8, pattern, 3), whole_OI)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores_are_what_a_unit_adds_or_takes_away(pattern: Pattern) -> None:
    weight_OI, _, stats = example(out=ROWS + 16, inp=40, tokens=60)  # two pieces, the last short
    gram_II = stats.hessian_II
    mask_OI = polish(weight_OI, pattern.best(weight_OI.abs()), gram_II, pattern, 30)
    found_OU = pattern.sum_of_units(scores(weight_OI, mask_OI, gram_II, pattern))
    before_O = errors(weight_OI, mask_OI, gram_II)
    for unit in range(40 // pattern.unit):
        other_OI, here = mask_OI.clone(), slice(unit * pattern.unit, (unit + 1) * pattern.unit)
        other_OI[:, here] ^= True
        change_O = errors(weight_OI, other_OI, gram_II) - before_O
        kept_O = mask_OI[:, here.start]
        expected_O = torch.where(kept_O, change_O, -change_O)
        # The error is a sum of 1,600 products in fp32, each good to 6e-8 of itself.
        torch.testing.assert_close(
            found_OU[:, unit].double(), expected_O, rtol=0, atol=1e-5 * float(before_O.max())
        )
        assert (found_OU[:, unit].double() + expected_O).abs().max() > 1e-3 * before_O.max()
    # At rest most kept units have the larger scores; those of magnitude's mask have not.
    raw_OI = pattern.best(weight_OI.abs())
    agreement = [
        float((pattern.best(scores(weight_OI, one, gram_II, pattern)) == one).double().mean())
        for one in (mask_OI, raw_OI)
    ]
    assert agreement[0] > 0.97 > 0.9 > agreement[1]


def test_is_an_option_of_every_mask_whose_weights_stay() -> None:
    weight_OI, stats = problem()
    settings = PruneSection(polish=2)
    plain = CRITERIA["wanda"].prune(weight_OI, Statistics(stats), Pattern(2, 4), settings)
    criterion = find_criterion("wanda", settings)
    assert criterion.needs_hessian and criterion.reads == ("polish",)
    pruned = criterion.prune(weight_OI, Statistics(stats), Pattern(2, 4), settings)
    own_OI = scores(weight_OI, pruned.mask_OI, stats.hessian_II, Pattern(2, 4))
    assert torch.equal(pruned.score_OI, own_OI)
    assert not torch.equal(pruned.mask_OI, plain.mask_OI)
    assert find_criterion("ria", settings).mixes_rows
    assert find_criterion("gblm", settings).needs_gradients
    assert find_criterion("sparsegpt_update", settings) is CRITERIA["sparsegpt_update"]
    assert find_criterion("wanda", PruneSection()) is CRITERIA["wanda"]
