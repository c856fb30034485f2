"""Margins: the distance of each score from the middle of its group, in medians, in 4 bits."""

from __future__ import annotations

import math

import pytest
import torch

from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.margins import LEVELS, graded, margins_of, to_codes, to_levels
from megamask.sparsity.pattern import Pattern

# A code is half an octave wide: a margin is read back within half a code of its own and half a code
# of the median. The sums in fp32 add less than a millionth.
WITHIN = 2 ** (1 / 4 + 1 / 4) * (1 + 1e-5)


def margin_by_hand(scores: list[float], n: int) -> list[float]:
    """The distance of every score of a group from the middle of the n-th and the next."""
    in_order = sorted(scores, reverse=True)
    middle = (in_order[n - 1] + in_order[n]) / 2
    return [abs(score - middle) for score in scores]


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:9", "8:16"])
@pytest.mark.parametrize("unit", [1e-15, 1.0, 1e12])
def test_margins_are_read_back(text: str, unit: float) -> None:
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    score_OI = (unit * torch.randn(24, 12 * pattern.m).exp()).float()
    mask_OI = pattern.best(score_OI)
    levels_OI = to_levels(to_codes(score_OI, mask_OI, pattern))
    found_OI = margins_of(levels_OI)
    rows = score_OI.double().unflatten(1, (-1, pattern.m)).tolist()
    wanted = [x for row in rows for group in row for x in margin_by_hand(group, pattern.n)]
    median = sorted(wanted)[(len(wanted) - 1) // 2]
    lowest, highest = (4 * 2 ** ((level - LEVELS + 1) / 2) for level in (0, LEVELS - 1))
    for x, found in zip(wanted, found_OI.flatten().tolist(), strict=True):
        clipped = min(max(x / median, lowest), highest)
        assert 1 / WITHIN < found / clipped < WITHIN, (x / median, found)
    wrong = margins_of(levels_OI.clamp(min=1) - 1) / found_OI  # of a median one code off
    assert bool((wrong[levels_OI > 0] < 1 / 1.4).all())


def test_shards_have_the_codes_of_the_whole() -> None:
    """A rank that holds some rows or columns needs no other rank."""
    pattern = Pattern(2, 4)
    score_OI = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    mask_OI = pattern.best(score_OI)
    whole_OI = to_codes(score_OI, mask_OI, pattern)
    for axis in (0, 1):
        parts = zip(score_OI.chunk(2, axis), mask_OI.chunk(2, axis), strict=True)
        assert torch.equal(torch.cat([to_codes(*one, pattern) for one in parts], axis), whole_OI)


def test_a_tie_has_the_smallest_margin_and_stays_as_it_was_decided() -> None:
    pattern = Pattern(2, 4)
    score_OI = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 1.0, 0.0]])
    mask_OI = pattern.best(score_OI)
    margins_OI = margins_of(to_levels(to_codes(score_OI, mask_OI, pattern)))
    assert bool((margins_OI[0] == margins_OI.min()).all()) and float(margins_OI.min()) > 0
    prior_OI = graded(mask_OI, margins_OI, cap=2.0)
    assert torch.equal(prior_OI > 0.5, mask_OI)


@pytest.mark.parametrize("text", ["2:4", "1:4", "8:16"])
def test_the_mask_of_the_criterion_has_the_distances_from_the_middle(text: str) -> None:
    """Bit for bit the codes of the plain rule: the middle of the least kept and the largest removed
    score.
    """
    pattern, draws = Pattern.parse(text), torch.Generator().manual_seed(3)
    normal_OI = torch.randn(64, 8 * pattern.m, generator=draws)
    for score_OI in (normal_OI, normal_OI.bfloat16(), normal_OI * 1e-44, normal_OI.round()):
        mask_OI = pattern.best(score_OI)
        score, kept = (one.unflatten(1, (-1, pattern.m)) for one in (score_OI.float(), mask_OI))
        least = score.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        largest = score.masked_fill(kept, -torch.inf).amax(-1, keepdim=True)
        octaves = (score - (least / 2 + largest / 2)).abs().log2()
        expected = (octaves * 2).round().add(128).clamp(0, 255).flatten(1).byte()
        assert torch.equal(to_codes(score_OI, mask_OI, pattern), expected)
        assert not torch.equal(to_codes(score_OI.float() * 2, mask_OI, pattern), expected) or (
            not expected.any()
        )


def test_a_weight_that_a_polish_exchanged_starts_unsure() -> None:
    """10 gave its place to 1: both could not be further from the middle, on the wrong side."""
    pattern, score_OI = Pattern(2, 4), torch.tensor([[10.0, 6.0, 4.0, 1.0], [9.0, 6.0, 4.0, 1.0]])
    mask_OI = torch.tensor([[False, True, False, True], [True, True, False, False]])
    codes_OI = to_codes(score_OI, mask_OI, pattern)
    plain_OI = to_codes(score_OI, pattern.best(score_OI), pattern)
    assert codes_OI[0, [0, 3]].tolist() == [0, 0] and bool((plain_OI > 0).all())
    codes_OI[0, [0, 3]] = plain_OI[0, [0, 3]]
    assert torch.equal(codes_OI, plain_OI)  # all others keep theirs
    margins_OI = margins_of(to_levels(to_codes(score_OI, mask_OI, pattern)))
    assert bool((margins_OI[0, [0, 3]] < margins_OI[0, [1, 2]].min()).all())
    prior_OI = graded(mask_OI, margins_OI, cap=2.0)
    assert torch.equal(prior_OI > 0.5, mask_OI)
    assert float((prior_OI[0, [0, 3]] - 0.5).abs().max()) < 0.02


def test_all_margins_alike_are_the_mask() -> None:
    mask_OI = torch.tensor([[True, False, True, False]])
    assert torch.equal(graded(mask_OI, torch.ones(1, 4), cap=2.0), mask_OI.float())
    assert graded(mask_OI, torch.full((1, 4), 3.0), cap=2.0).tolist() == [[1.5, -0.5, 1.5, -0.5]]


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_a_graded_prior_starts_at_its_mask_and_in_its_order(name: str) -> None:
    """The logits of a graded start have the prior as hard mask, no mean, and give its margins back:
    a snapshot of the first step is as good a prior as the criterion.
    """
    pattern, distribution = Pattern(2, 4), DISTRIBUTIONS[name]
    score_OI = torch.rand(64, 64, generator=torch.Generator().manual_seed(2))
    mask_OI = pattern.best(score_OI)
    levels_OI = to_levels(to_codes(score_OI, mask_OI, pattern))
    prior_OI = graded(mask_OI, margins_of(levels_OI), cap=math.inf)
    logits_OLG = distribution.prior_bonus(prior_OI, pattern, 3.0, 0.01)
    assert float(logits_OLG.mean(1).abs().max()) < 1e-7  # rounding of values below 0.2
    assert torch.equal(distribution.hard_mask(logits_OLG, pattern), mask_OI)
    scores_OI = distribution.scores(logits_OLG, pattern)
    assert torch.equal(pattern.best(scores_OI), mask_OI)
    if name == "subset":  # a logit's distance from the middle is the margin, but for the middle
        again_OI = margins_of(to_levels(to_codes(scores_OI, mask_OI, pattern)))
        ratio = (again_OI / margins_of(levels_OI)).log2().abs()
        assert float(ratio.median()) <= 0.5 and float(ratio.max()) <= 2.5
