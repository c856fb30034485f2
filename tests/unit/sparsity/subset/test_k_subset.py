"""The k-subset distribution in plain PyTorch against brute force over all candidates; wrong answers
are shown to fail.

Shapes: O out_features, I in_features, G groups per row, M group size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamask.errors import ConfigError
from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Site, scores
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset import k_subset
from megamask.sparsity.subset.subset import SUBSET
from tests.masks import is_valid
from tests.unit.sparsity.categorical import reference
from tests.unit.sparsity.subset import subsets
from tests.unit.sparsity.subset.subsets import PATTERNS

ROWS, GROUPS = 6, 5
KEY = NoiseKey(seed=7, step=3, micro_batch=2, parameter=12345)
SINK = GradientSink(norm_coef=0.03)
SCALES = [
    (100.0, 4.0),
    (500.0, 4.0),
    (100.0, 1.0),
    (500.0, 1.0),
    (100.0, 0.05),
    (500.0, 0.05),
]  # kappa, tau
EPS = 2.0**-24


def problem(
    n: int, m: int, dtype: torch.dtype = torch.float64
) -> tuple[Site, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Site, logits (O, M, G), weight (O, I), gradient at the masked weight (O, I)."""
    site = Site(Pattern(n, m), Placement.whole(ROWS, GROUPS), SUBSET)
    generator = torch.Generator().manual_seed(n * 10 + m)
    logits = 0.01 * torch.randn(ROWS, m, GROUPS, dtype=torch.float64, generator=generator)
    weight, grad = (
        torch.randn(ROWS, GROUPS * m, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return site, logits.to(dtype), weight.to(dtype), grad.to(dtype)


def brute_force(
    site: Site, logits: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, draw: Sample
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask, gradient at the logits of sum grad W * M - coef |W * M|^2 by autograd), fp64."""
    n, m = site.pattern.n, site.pattern.m
    noise = draw.noise * reference.gumbel(draw.key, ROWS, m, GROUPS)
    leaf = logits.double().requires_grad_()
    mask = subsets.mask(leaf, noise, n, draw.kappa, draw.tau, draw.hard)
    masked = weight.double() * mask
    loss = (grad.double() * masked).sum() - SINK.norm_coef * masked.square().sum()
    return mask.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(
    ("kappa", "tau", "noise"),
    [*((*one, 1.0) for one in SCALES), (300.0, 1.0, 0.5), (300.0, 1.0, 0)],
)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_masks_and_gradients_equal_brute_force(
    n: int, m: int, kappa: float, tau: float, noise: float, hard: bool
) -> None:
    site, logits, weight, grad = problem(n, m)
    draw = Sample(KEY, kappa, tau, hard, noise)
    expected, expected_dlogits = brute_force(site, logits, weight, grad, draw)
    masked, (norm, _), _ = k_subset.forward(logits, weight, site, draw)
    dlogits = k_subset.backward(grad, logits, weight, site, draw, SINK)
    # fp64 on both sides: a rounding is 1e-16. Scores reach 600 (errors 1e-13), a sum over 12,870
    # candidates rounds as often, and the gradient multiplies by kappa / tau.
    torch.testing.assert_close(masked, weight * expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(norm, masked.square().sum(), rtol=1e-12, atol=0)
    size = kappa / tau * n
    torch.testing.assert_close(dlogits, expected_dlogits, rtol=0, atol=1e-12 * size)
    assert (
        tau == 0.05 or float(expected_dlogits.abs().max()) > 1e-3 * size
    )  # the comparison is about something


@pytest.mark.parametrize(("kappa", "tau"), SCALES)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (5, 6), (16, 32), (13, 16)])
def test_fp32_is_stable_at_every_temperature(n: int, m: int, kappa: float, tau: float) -> None:
    site, logits, *_ = problem(n, m, torch.float32)
    score = scores(logits, site, Sample(KEY, kappa, tau))
    mask = k_subset.marginals(score, site.pattern)
    # The same scores on both sides, so that only the polynomials are compared. Each of about 2 M K
    # operations on positive terms rounds relatively; their errors grow like the square root, a
    # factor of four is left.
    error = 4 * EPS * (2 * m * min(n, m - n)) ** 0.5 + 4 * EPS
    wide = k_subset.marginals(
        score.double(), site.pattern
    )  # equal to brute force by the test above
    torch.testing.assert_close(mask.double(), wide, rtol=0, atol=error)
    torch.testing.assert_close(
        mask.double().sum(1), torch.full_like(wide[:, 0], n), rtol=0, atol=m * error
    )
    slope = torch.randn(score.shape, generator=torch.Generator().manual_seed(1))
    found, expected = (
        k_subset.covariances(one, slope.to(one.dtype), site.pattern)
        for one in (score, score.double())
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * n * error)
    # Small probabilities too are right relatively: the optimizer divides by the gradient's own
    # size. Differences of scores round.
    clear = (wide > 1e-25) & (wide < 0.5)
    relative = (mask.double() / wide - 1).abs()[clear]
    assert not clear.any() or float(relative.max()) < 100 * error + 8 * EPS * float(
        score.abs().max()
    )


def shifted_by_the_maximum(score_OMG: torch.Tensor, n: int) -> torch.Tensor:
    """E_{N-1}(w without i) w_i / E_N(w) with w = exp(l - max l): the stable softmax carried over,
    which is not stable here.
    """
    w = (score_OMG - score_OMG.amax(1, keepdim=True)).exp()

    def symmetric(positions: torch.Tensor) -> list[torch.Tensor]:
        sums = [torch.ones_like(positions[:, 0])] + [torch.zeros_like(positions[:, 0])] * n
        for j in range(positions.shape[1]):
            sums = [sums[0], *(sums[c] + positions[:, j] * sums[c - 1] for c in range(1, n + 1))]
        return sums

    others = [torch.cat([w[:, :j], w[:, j + 1 :]], 1) for j in range(w.shape[1])]
    return torch.stack(
        [w[:, j] * symmetric(rest)[n - 1] / symmetric(w)[n] for j, rest in enumerate(others)], 1
    )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16)])
def test_a_shift_by_the_maximum_underflows_at_the_end_of_the_schedules(n: int, m: int) -> None:
    site, logits, *_ = problem(n, m, torch.float32)
    for kappa, tau, is_fine in ((100.0, 4.0, True), (500.0, 0.05, False)):
        score = scores(logits, site, Sample(KEY, kappa, tau))
        naive = shifted_by_the_maximum(score, n)
        assert bool(naive.isfinite().all()) == is_fine
        assert k_subset.marginals(score, site.pattern).isfinite().all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 5)])
def test_gradcheck(n: int, m: int) -> None:
    site = Site(Pattern(n, m), Placement.whole(2, 3), SUBSET)
    logits = 0.02 * torch.randn(
        2, m, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    weight = torch.randn(2, 3 * m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draw = Sample(KEY, kappa=20.0, tau=2.0)
    assert torch.autograd.gradcheck(
        lambda at: sample_mask(at, weight, site, draw, k_subset).masked, logits.requires_grad_()
    )


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_wrong_answers_fail(n: int, m: int) -> None:
    site, logits, weight, grad = problem(n, m)
    draw = Sample(KEY, 100.0, 1.0)
    _, expected = brute_force(site, logits, weight, grad, draw)
    wrong = {
        "sign": replace(draw, kappa=-draw.kappa),
        "kappa": replace(draw, kappa=1.0),
        "tau": replace(draw, tau=4.0),
        "noise": replace(draw, noise=0.9),
        "step": replace(draw, key=replace(KEY, step=4)),
        "norm": draw,
    }
    for name, other in wrong.items():
        sink = RETURNED if name == "norm" else SINK
        difference = k_subset.backward(grad, logits, weight, site, other, sink) - expected
        assert difference.abs().max() > 0.01 * expected.abs().max(), (
            f"a wrong {name} went unnoticed"
        )
    # Independent positions would have the gradient m (1 - m) d alone.
    score = scores(logits, site, draw)
    slope = (grad * weight).unflatten(1, (-1, m)).transpose(1, 2)
    mask = k_subset.marginals(score, site.pattern)
    alone, whole = mask * (1 - mask) * slope, k_subset.covariances(score, slope, site.pattern)
    assert (alone - whole).abs().max() > 0.1 * whole.abs().max()
    assert whole.sum(1).abs().max() < 1e-10  # the sum over positions is constant


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (8, 16)])
def test_soft_masks_tend_to_the_largest_scores(n: int, m: int) -> None:
    site, logits, *_ = problem(n, m)
    score = scores(logits, site, Sample(KEY, 100.0, 1.0))
    hard = k_subset.largest(score, site.pattern)
    assert is_valid(site.pattern, hard.transpose(1, 2).flatten(1))
    distance = [
        float((k_subset.marginals(score / tau, site.pattern) - hard).abs().mean())
        for tau in (4.0, 1.0, 0.25, 0.05)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.05


def test_equal_scores_keep_the_earlier_positions() -> None:
    pattern, flat = Pattern(2, 4), torch.zeros(1, 4, 1)
    assert k_subset.largest(flat, pattern).flatten().tolist() == [1, 1, 0, 0]
    assert k_subset.marginals(flat, pattern).flatten().tolist() == [0.5] * 4


def test_one_of_m_is_the_categorical_distribution() -> None:
    site, logits, weight, grad = problem(1, 4)
    other, draw = replace(site, distribution=CATEGORICAL), Sample(KEY, 100.0, 0.5)
    for found, expected in (
        (
            k_subset.forward(logits, weight, site, draw).masked,
            gumbel_softmax.forward(logits, weight, other, draw).masked,
        ),
        (
            k_subset.backward(grad, logits, weight, site, draw, SINK),
            gumbel_softmax.backward(grad, logits, weight, other, draw, SINK),
        ),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)  # fp64, scores below 100


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_statistics_name_the_best_candidate_and_its_probability(n: int, m: int) -> None:
    site, logits, *_ = problem(n, m)
    hard_codes, largest = k_subset.mask_statistics(logits, site, 100.0)
    assert hard_codes.dtype == (torch.uint8 if m <= 8 else torch.int16)
    chance = subsets.probabilities(100.0 * logits, n)
    assert torch.equal(
        site.mask_of(hard_codes), subsets.table(n, m)[chance.argmax(1)].bool().flatten(1)
    )
    torch.testing.assert_close(largest, chance.amax(1).sum(), rtol=1e-11, atol=0)
    entropy = -(chance * chance.log()).sum(1)
    torch.testing.assert_close(
        k_subset.subset_entropy(100.0 * logits, site.pattern), entropy, rtol=1e-11, atol=0
    )


def test_hard_codes_of_32_positions_and_no_more() -> None:
    pattern = Pattern(16, 32)
    site = Site(pattern, Placement.whole(4, 3), SUBSET)
    logits = torch.randn(4, 32, 3, generator=torch.Generator().manual_seed(0))
    hard_codes, _ = k_subset.mask_statistics(logits, site, 1.0)
    assert hard_codes.dtype == torch.int32
    assert torch.equal(site.mask_of(hard_codes), pattern.best(logits.transpose(1, 2).flatten(1)))
    with pytest.raises(ConfigError, match=r"3:33.*M up to 32"):
        Site(Pattern(3, 33), Placement.whole(1, 1), SUBSET)
    with pytest.raises(ConfigError, match=r"8:16.*learn.method=subset"):
        Site(Pattern(8, 16), Placement.whole(1, 1), CATEGORICAL)


def test_bf16_logits_and_a_buffer_to_add_to() -> None:
    site, logits, weight, grad = problem(4, 8, torch.float32)
    draw, low = Sample(KEY, 100.0, 1.0), logits.bfloat16()
    masked = k_subset.forward(low, weight.bfloat16(), site, draw).masked
    assert masked.dtype == torch.bfloat16
    dlogits = k_subset.backward(grad, low.float(), weight, site, draw, SINK)
    assert torch.equal(k_subset.backward(grad, low, weight, site, draw, SINK), dlogits.bfloat16())
    buffer = torch.ones_like(logits)
    sink = replace(SINK, buffer=buffer)
    assert k_subset.backward(grad, low, weight, site, draw, sink) is buffer
    assert torch.equal(buffer, 1 + dlogits)


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_finite_logits_of_any_size_give_finite_results(shape: tuple[int, int]) -> None:
    site, logits, weight, grad = problem(*shape, torch.float32)
    draw = Sample(KEY, kappa=500.0, tau=0.05)
    for scale in (0.0, 1.0, 100.0, 1e4, 1e20):
        masked, (norm, _), _ = k_subset.forward(scale * logits, weight, site, draw)
        dlogits = k_subset.backward(grad, scale * logits, weight, site, draw, SINK)
        assert all(bool(torch.isfinite(one).all()) for one in (masked, norm, dlogits))
