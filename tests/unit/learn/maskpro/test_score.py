"""MaskPro's maths: scores against autograd of the written-out probability, stability, the law of
the draws, kernels, the estimator.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from megamask.errors import ConfigError
from megamask.learn.maskpro import score, score_numba
from megamask.learn.maskpro.policy_gradient import Tracker, advantages
from megamask.learn.maskpro.score import (
    choose_score,
    ordered_score,
    sample_of,
    score_of,
    set_score,
)
from megamask.sparsity.draw import Site, scores
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset.subset import SUBSET
from tests.unit.learn.maskpro.ordered_law import log_probability, log_set_probability
from tests.unit.learn.maskpro.ordered_law import score as expected_score
from tests.unit.sparsity.samplers import FUSED

KINDS = ("ordered", "set")
SHAPES = [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8)]
# A shape compiles kernels of its own. Of 3:4 and 2:5, 5:6 holds the rules: more than half of a
# group, and a group that is no power of two.
COMPILED = [(1, 4), (2, 4), (5, 6), (4, 8)]
# nats: 23-bit uniforms give Gumbels in -2.8 .. 16.7, so nothing further behind is ever drawn
DRAWABLE = 19.5


def found_score(logits_M: torch.Tensor, positions: tuple[int, ...], kind: str) -> torch.Tensor:
    m, n = len(logits_M), len(positions)
    rank = torch.full((1, m, 1), n)
    for place, position in enumerate(positions):
        rank[0, position, 0] = place
    group = logits_M.view(1, m, 1)
    return (
        ordered_score(group, rank, n) if kind == "ordered" else set_score(group, rank < n, n)
    ).flatten()


def is_drawable(logits_M: torch.Tensor, positions: tuple[int, ...]) -> bool:
    others = [j for j in range(len(logits_M)) if j not in positions]
    return float(logits_M[others].max() - logits_M[list(positions)].min()) < DRAWABLE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_score_is_the_gradient_of_the_log_probability(n: int, m: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(n * m)
    for spread in (0.5, 5.0):
        logits = spread * torch.randn(m, generator=generator, dtype=torch.float64)
        for positions in itertools.islice(
            itertools.permutations(range(m), n), 0, None, 1 + 60 * (m == 8)
        ):
            if is_drawable(logits, positions):
                # fp64 against fp64: some hundred roundings of 1e-16, times 1 / P(set) at worst
                # where a set is unlikely (exp(-19.5) = 3e-9)
                assert (
                    float(
                        (
                            found_score(logits, positions, kind)
                            - expected_score(logits, positions, kind)
                        )
                        .abs()
                        .max()
                    )
                    < 1e-6
                ), positions


def test_the_two_scores_differ_and_agree_on_average() -> None:
    logits, positions = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64), (0, 2)
    orders = torch.stack(
        [found_score(logits, order, "ordered") for order in itertools.permutations(positions)]
    )
    assert float((orders[0] - orders[1]).abs().max()) > 0.1
    weight = torch.stack(
        [log_probability(logits, order) for order in itertools.permutations(positions)]
    ).softmax(0)
    assert torch.allclose(
        (weight[:, None] * orders).sum(0), found_score(logits, positions, "set"), atol=1e-12
    )  # fp64 roundings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_stable_as_p_tends_to_one(n: int, m: int, kind: str) -> None:
    """fp32 against fp64, from undecided groups to gaps at which exp would overflow fp32 (88) by
    far; kept and swapped members alike.
    """
    pattern = torch.linspace(-0.7, 0.9, m, dtype=torch.float64)
    for gap in (0.0, 3.0, 10.0, 19.0, 60.0, 300.0):
        logits = pattern + gap * (torch.arange(m) < n)
        for positions in (tuple(range(n)), tuple(reversed(range(n))), (*range(1, n), m - 1)):
            if is_drawable(logits, positions):
                found, expected = (
                    found_score(logits.float(), positions, kind),
                    found_score(logits, positions, kind),
                )
                # Logits of 300 carry an fp32 rounding of 1.5e-5, which scores of up to 2 N see; the
                # sums add a few of 6e-8.
                tolerance = 2 * n * max(gap, 1.0) * 2.0**-24 + 1e-6
                assert (
                    bool(found.isfinite().all())
                    and float((found - expected).abs().max()) < tolerance
                ), (gap, positions)


def test_what_is_left_is_not_a_difference() -> None:
    """At a gap of 18 a kept member's score, 1 - p = 3e-8, is below fp32's resolution of 1, and
    still has three digits.
    """
    logits = torch.tensor([18.0, 0.0, 0.5, -0.5], dtype=torch.float64)
    for kind in KINDS:
        found, expected = found_score(logits.float(), (0,), kind), found_score(logits, (0,), kind)
        assert (
            float((found / expected - 1).abs().max()) < 1e-5
        )  # a few fp32 roundings of factors: 18 enters exp with 18 * 6e-8
    p = torch.softmax(logits.float(), 0)
    assert float((1 - p[0]) / expected[0] - 1) != pytest.approx(
        0, abs=0.1
    )  # by subtraction: nothing right


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (5, 6)])
def test_draws_follow_the_law(n: int, m: int) -> None:
    groups, logits = 60_000, torch.tensor([1.1, -0.4, 0.2, 0.9, -1.0, 0.5])[:m]
    site = Site(Pattern(n, m), Placement.whole(1, groups), SUBSET)
    masked = FUSED.forward(
        logits[None, :, None].repeat(1, 1, groups),
        torch.ones(1, m * groups),
        site,
        sample_of(NoiseKey(seed=5, step=7)),
    ).masked
    counts = torch.bincount(
        site.pattern.index_of(masked).flatten(), minlength=site.pattern.num_candidates
    ).double()
    law = torch.stack(
        [
            log_set_probability(logits.double(), positions)
            for positions in itertools.combinations(range(m), n)
        ]
    ).exp()
    assert float(law.sum()) == pytest.approx(1)
    statistic = float(((counts - groups * law).square() / (groups * law)).sum())
    # P(chi-square > limit) = 1e-6 for C - 1 degrees of freedom
    assert statistic < {3: 30.7, 5: 35.9}[site.pattern.num_candidates - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), COMPILED)
def test_kernel_adds_what_the_reference_adds(n: int, m: int, kind: str) -> None:
    logits = 3 * torch.randn(5, m, 77, generator=torch.Generator().manual_seed(1))
    site, key, coefficients = (
        Site(Pattern(n, m), Placement.whole(5, 77), SUBSET),
        NoiseKey(3, 5, 0, 77),
        [0.5, -1.0, 2.0],
    )
    found, expected = logits.clone(), logits.double()
    score_numba.add_scores(found, site, key, coefficients, kind)
    score.add_scores(expected, site, key, coefficients, kind)
    # scores up to N in fp32: a few roundings, exp2 within 2.4e-7, times coefficients of 3.5
    # together. Logits up to 12 round to 5e-7.
    assert float((found - expected).abs().max()) < 5e-6
    assert float((found - logits).abs().mean()) > 0.1
    other = logits.clone()
    score_numba.add_scores(other, site, replace(key, step=6), coefficients, kind)
    assert float((other - expected).abs().max()) > 0.1  # another draw would be seen


def test_shards_get_the_bits_of_the_whole() -> None:
    logits, pattern, key = (
        3 * torch.randn(6, 4, 40, generator=torch.Generator().manual_seed(1)),
        Pattern(2, 4),
        NoiseKey(3, 5, 0, 9),
    )
    whole = logits.clone()
    score_numba.add_scores(
        whole, Site(pattern, Placement.whole(6, 40), SUBSET), key, [1.0, -2.0], "set"
    )
    for axis, shards in ((0, logits.chunk(2, 0)), (1, logits.chunk(2, 2))):
        parts = []
        for rank, shard in enumerate(shards):
            part = shard.clone(memory_format=torch.contiguous_format)
            placement = Placement.shard(part.shape[0], part.shape[2], axis=axis, rank=rank, size=2)
            score_numba.add_scores(part, Site(pattern, placement, SUBSET), key, [1.0, -2.0], "set")
            parts.append(part)
        assert torch.equal(torch.cat(parts, 0 if axis == 0 else 2), whole)


class Toy:
    """Two groups of 2:4 and an objective with interactions: its exact gradient, and single-draw
    estimates in fp64, one a row.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.logits_MG = torch.tensor(
            [[0.9, -0.2], [0.3, 1.2], [-0.6, 0.1], [0.2, -0.8]], dtype=torch.float64
        )
        pattern, self.rows = Pattern(2, 4), rows
        site = Site(pattern, Placement.whole(rows, 2), SUBSET)
        self.logits = self.logits_MG.repeat(rows, 1, 1)
        self.perturbed = scores(self.logits, site, sample_of(NoiseKey(seed, 0)))
        mask = torch.zeros_like(self.logits).scatter_(1, self.perturbed.topk(2, dim=1).indices, 1)
        self.residual = self.objective(mask)

    @staticmethod
    def objective(mask_RMG: torch.Tensor) -> torch.Tensor:
        """(R,): far from 0, as residuals are, linear and bilinear in the masks."""
        slope = torch.tensor(
            [[0.5, -0.3], [0.1, 0.8], [-0.7, 0.2], [0.3, -0.4]], dtype=torch.float64
        )
        first, second = mask_RMG[..., 0], mask_RMG[..., 1]
        return (
            2.0
            + (mask_RMG * slope).sum((1, 2))
            + 0.6 * first[:, 0] * second[:, 2]
            - 0.9 * first[:, 3] * second[:, 1]
        )

    def exact(self) -> torch.Tensor:
        """d E(objective) / d logits, (M, G), over all 36 masks."""
        leaf, sets = (
            self.logits_MG.clone().requires_grad_(),
            list(itertools.combinations(range(4), 2)),
        )
        total = leaf.new_zeros(())
        for a, b in itertools.product(sets, sets):
            mask = torch.zeros(1, 4, 2, dtype=torch.float64)
            mask[0, list(a), 0] = mask[0, list(b), 1] = 1
            total = total + (
                log_set_probability(leaf[:, 0], a) + log_set_probability(leaf[:, 1], b)
            ).exp() * self.objective(mask)
        return torch.autograd.grad(total, leaf)[0]

    def estimates(self, kind: str, advantage_R: torch.Tensor) -> torch.Tensor:
        return advantage_R[:, None, None] * score_of(self.logits, self.perturbed, 2, kind)

    def z(self, estimates: torch.Tensor) -> float:
        """Largest distance of the mean from the exact gradient, in standard errors."""
        error = estimates.std(0) / len(estimates) ** 0.5
        return float(((estimates.mean(0) - self.exact()) / error).abs().max())


ROWS, Z = 40_000, 5.0  # P(any of 8 normal coordinates is further than 5 standard errors out) = 5e-6


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(ROWS, seed=11)


def by_tracker(toy: Toy) -> torch.Tensor:
    """Rows as steps of one mask; undone: the factor ``decay`` that taking the step in first brings.
    The start of the average is kept.
    """
    tracker = Tracker(0.99)
    return (
        torch.tensor(
            [advantages("tracker", [float(one)], tracker)[0] for one in toy.residual],
            dtype=torch.float64,
        )
        / 0.99
    )


def by_others(toy: Toy, masks: int) -> torch.Tensor:
    steps = toy.residual.view(-1, masks).tolist()
    return torch.tensor(
        [advantages("leave_one_out", step, Tracker(0.0)) for step in steps], dtype=torch.float64
    ).flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_unbiased(toy: Toy, kind: str) -> None:
    for advantage in (toy.residual, by_tracker(toy), by_others(toy, 4)):
        assert toy.z(toy.estimates(kind, advantage)) < Z


def test_a_wrong_score_or_baseline_is_seen(toy: Toy) -> None:
    p = torch.softmax(toy.logits, 1)
    mask = torch.zeros_like(toy.logits).scatter_(1, toy.perturbed.topk(2, dim=1).indices, 1)
    with_replacement = toy.residual[:, None, None] * (mask - 2 * p)
    assert toy.z(with_replacement) > 2 * Z
    with_itself = toy.residual.view(-1, 4) - toy.residual.view(-1, 4).mean(
        1, keepdim=True
    )  # the mean of all four, itself too
    assert toy.z(toy.estimates("set", with_itself.flatten())) > 2 * Z


def test_baselines_and_sets_lower_the_variance(toy: Toy) -> None:
    def variance(kind: str, advantage: torch.Tensor) -> float:
        return float(
            toy.estimates(kind, advantage)[1000:].var(0).sum()
        )  # after the tracker's start

    plain = variance("set", toy.residual)
    # Residuals here are 2 on average with a spread of 1: the mean square falls to a fifth. 39,000
    # rows tell a ratio to some percent.
    assert variance("set", by_tracker(toy)) < 0.4 * plain
    assert (
        variance("set", by_others(toy, 4)) < 0.5 * plain
    )  # three others know the mean less well than the tracker
    assert variance("set", by_tracker(toy)) < 0.9 * variance("ordered", by_tracker(toy))


def test_a_set_of_many_orders_is_refused() -> None:
    assert (choose_score("auto", Pattern(4, 8)), choose_score("auto", Pattern(8, 16))) == (
        "set",
        "ordered",
    )
    with pytest.raises(ConfigError, match=r"learn\.maskpro\.score.*ordered for N > 4.*auto"):
        choose_score("set", Pattern(8, 16))
