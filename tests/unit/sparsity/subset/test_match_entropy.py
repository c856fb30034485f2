"""The linear start: as undecided as the categorical one with the same alpha.

Shapes: O out_features, I in_features, G groups per row, M group size.
"""

from __future__ import annotations

import pytest
import torch

from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import Site
from megamask.sparsity.initial_logits import initial_noise
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset.match_entropy import (
    categorical_entropy,
    mean_subset_entropy,
    noise_scale,
    position_bonus,
)
from megamask.sparsity.subset.subset import SUBSET
from tests.unit.sparsity.subset import subsets

STD, KAPPA = 0.01, 100.0  # the first kappa of the schedule


def start(
    n: int,
    m: int,
    distribution: Distribution,
    strength: float,
    groups: int = 4000,
    noise: bool = True,
) -> torch.Tensor:
    """Initial logits (1, C or M, G) as a learner makes them."""
    site = Site(Pattern(n, m), Placement.whole(1, groups), distribution)
    prior = site.pattern.best(torch.rand(1, groups * m, generator=torch.Generator().manual_seed(0)))
    logits = site.distribution.prior_bonus(
        prior, site.pattern, strength, STD, KAPPA * STD if noise else 0.0
    )
    return logits + initial_noise(site, groups, STD, 1, 2) if noise else logits


def candidate_scores(
    logits: torch.Tensor, n: int, m: int, distribution: Distribution
) -> torch.Tensor:
    scores = KAPPA * logits.double()
    return (
        scores
        if distribution is CATEGORICAL
        else torch.einsum("omg,cm->ocg", scores, subsets.table(n, m))
    )


def entropy(logits: torch.Tensor, n: int, m: int, distribution: Distribution) -> float:
    """Mean entropy of softmax over all candidates of kappa times their logits."""
    log_p = candidate_scores(logits, n, m, distribution).log_softmax(1)
    return float(-(log_p.exp() * log_p).sum(1).mean())


@pytest.mark.parametrize("strength", [1.0, 3.0])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_both_starts_have_the_same_entropy(n: int, m: int, strength: float) -> None:
    expected = entropy(start(n, m, CATEGORICAL, strength), n, m, CATEGORICAL)
    found = entropy(start(n, m, SUBSET, strength), n, m, SUBSET)
    # Means over 4,000 groups with deviations of about 0.45 nats: a standard error of 0.007 on each
    # side; the calibration's own sample is no larger. Four of the sum of three.
    assert found == pytest.approx(expected, abs=4 * 0.007 * 3**0.5)
    doubled = entropy(start(n, m, SUBSET, 2 * strength), n, m, SUBSET)
    assert doubled < expected - 0.1  # the comparison sees a bonus twice as large


def test_the_largest_patterns_follow_the_same_rule() -> None:
    pattern, strength = Pattern(8, 16), 3.0
    bonus = position_bonus(pattern, strength, 1.0)
    assert 0.9 * strength < bonus < 1.2 * strength
    assert mean_subset_entropy(pattern, bonus, 1.0) == pytest.approx(
        categorical_entropy(pattern, strength, 1.0), rel=1e-3
    )
    found = entropy(start(8, 16, SUBSET, strength, groups=200), 8, 16, SUBSET)
    assert found == pytest.approx(
        categorical_entropy(pattern, strength, 1.0), rel=0.03
    )  # 200 groups: a standard error of 0.6 %


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_without_noise_the_starts_are_the_same_law(n: int, m: int) -> None:
    categorical, linear = (
        candidate_scores(start(n, m, kind, 3.0, groups=50, noise=False), n, m, kind).softmax(1)
        for kind in (CATEGORICAL, SUBSET)
    )
    torch.testing.assert_close(linear, categorical, rtol=1e-5, atol=0)  # fp32 logits
    assert position_bonus(Pattern(n, m), 3.0, 0.0) == 3.0


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
def test_the_scores_of_candidates_vary_as_much_within_a_group(n: int, m: int) -> None:
    spread = [
        float(candidate_scores(start(n, m, kind, 0.0), n, m, kind).var(1, unbiased=False).mean())
        for kind in (CATEGORICAL, SUBSET)
    ]
    assert spread[1] == pytest.approx(
        spread[0], rel=0.05
    )  # 4,000 groups of at least 3 degrees of freedom: a standard error of 1.3 %
    assert noise_scale(Pattern(1, 4)) == 1
    assert noise_scale(Pattern(2, 4)) == pytest.approx((5 / 6) ** 0.5)


def test_a_weak_prior_is_no_bonus_and_none_is_zero() -> None:
    assert position_bonus(Pattern(2, 4), 0.0, 1.0) == 0
    weak = position_bonus(Pattern(4, 8), 0.01, 1.0)
    assert mean_subset_entropy(Pattern(4, 8), weak, 1.0) == pytest.approx(
        categorical_entropy(Pattern(4, 8), 0.01, 1.0), rel=1e-3
    )  # 12 halvings
    assert (
        position_bonus(Pattern(2, 4), 0.01, 0.01) == 0
    )  # sums of positions are less random than candidates: even without a bonus


@pytest.mark.parametrize(
    ("alpha", "spread"), [(30.0, 1.0), (100.0, 1.0), (1e5, 1.0), (8.0, 100.0), (30.0, 100.0)]
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_a_prior_beyond_doubt_is_as_strong_as_it_says(
    n: int, m: int, alpha: float, spread: float
) -> None:
    """Both laws are certain there, so the entropy says nothing more about the bonus; the evidence
    that it takes to flip a group does.
    """
    assert categorical_entropy(Pattern(n, m), alpha, spread) < 1e-9
    assert position_bonus(Pattern(n, m), alpha, spread) == alpha


def test_the_hard_mask_of_a_start_is_most_often_the_prior() -> None:
    site = Site(Pattern(8, 16), Placement.whole(16, 32), SUBSET)
    prior = site.pattern.best(torch.rand(16, 512, generator=torch.Generator().manual_seed(3)))
    bonus = site.distribution.prior_bonus(prior, site.pattern, 3.0, STD, KAPPA * STD)
    for logits, least in ((bonus, 1.0), (bonus + initial_noise(site, 32, STD, 1, 2), 0.95)):
        kept = site.pattern.best(logits.transpose(1, 2).flatten(1))
        assert float((kept == prior).float().mean()) >= least
    assert bonus.sum(1).abs().max() < 1e-6  # a group's mean logit stays 0
