"""Patterns of pairs against loops over pairs, and their sampling against the formulas of single
weights and autograd in fp64.
"""

from __future__ import annotations

import random

import pytest
import torch

from megamask.errors import ConfigError
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import GradientSink, Sample, Site, scores
from megamask.sparsity.margins import to_codes
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask, sampler_at
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset import k_subset
from megamask.sparsity.subset.subset import SUBSET

P48 = Pattern(4, 8, 2)
ROWS, GROUPS = 6, 10
BOTH = pytest.mark.parametrize("distribution", [SUBSET, CATEGORICAL], ids=str)


def random_patterns(count: int) -> list[Pattern]:
    draw = random.Random(5)
    found = []
    for _ in range(count):
        unit, m = draw.choice((1, 2)), draw.randint(2, 32)
        found.append(Pattern(unit * draw.randint(1, m - 1), unit * m, unit))
    return found


@pytest.mark.parametrize("pattern", random_patterns(12), ids=str)
def test_a_random_pattern_keeps_the_best_units(pattern: Pattern) -> None:
    assert Pattern.parse(str(pattern)) == pattern and Pattern.parse(f" {pattern} ") == pattern
    score_OI = torch.randn(3, 5 * pattern.m, generator=torch.Generator().manual_seed(0))
    mask_OI = pattern.best(score_OI)
    for row, kept in zip(score_OI.tolist(), mask_OI.tolist(), strict=True):
        for start in range(0, len(row), pattern.m):
            units = range(start, start + pattern.m, pattern.unit)
            ranked = sorted(units, key=lambda at: -sum(row[at : at + pattern.unit]))
            best = {at + part for at in ranked[: pattern.units.n] for part in range(pattern.unit)}
            group = range(start, start + pattern.m)
            assert {at for at in group if kept[at]} == best
    index_OG = pattern.index_of(mask_OI)
    assert index_OG.shape == (3, 5) and int(index_OG.max()) < pattern.num_candidates
    assert torch.equal(pattern.mask_of(index_OG), mask_OI)
    assert torch.equal(SUBSET.mask_of(pattern.bits_of(mask_OI), pattern), mask_OI)
    assert pattern.already_fits(score_OI * mask_OI) and not pattern.already_fits(score_OI)
    assert pattern.density == mask_OI.float().mean()
    if pattern.unit == 1:
        return
    broken_OI = mask_OI.clone()  # as many weights of the group, of which two units keep a part
    first, last = mask_OI[0, : pattern.m].nonzero()[0], (~mask_OI[0, : pattern.m]).nonzero()[-1]
    broken_OI[0, first], broken_OI[0, last] = False, True
    with pytest.raises(ValueError, match=f"the mask is not {pattern}"):
        pattern.bits_of(broken_OI)
    assert not pattern.already_fits(score_OI * broken_OI)


@pytest.mark.parametrize("text", ["3:8:pair", "4:7:pair", "4:8:pairs", "4:8:", "4:8:2", "8:8:pair"])
def test_what_is_no_pattern_of_pairs(text: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        Pattern.parse(text)


def test_the_candidates_of_4_8_pair() -> None:
    words = ["".join(str(int(bit)) for bit in row) for row in P48.candidates()]
    assert words == ["11110000", "11001100", "11000011", "00111100", "00110011", "00001111"]
    assert P48.in_words == "2 of every 4 adjacent pairs"


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of 6 (categorical) or the first 4 (subset), weight and gradient, fp32."""
    draws = torch.Generator().manual_seed(0)
    logits = 0.01 * torch.randn(ROWS, 6, GROUPS, generator=draws)
    weight = torch.randn(ROWS, 8 * GROUPS, generator=draws)
    weight[0, :4] = 0  # pairs without any weight
    return logits, weight, torch.randn(ROWS, 8 * GROUPS, generator=draws)


def soft_mask(logits: torch.Tensor, site: Site, sample: Sample) -> torch.Tensor:
    """The mask of single units under the noise of the sample, (O, U), by autograd's operations."""
    score = scores(logits, site.of_units, sample)
    if site.distribution is SUBSET:
        return k_subset.marginals(score, site.pattern.units).transpose(1, 2).flatten(1)
    table = Pattern(2, 4).candidates(torch.float64)
    return torch.einsum("ocg,cu->ogu", score.softmax(1), table).flatten(1)


@BOTH
@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_a_draw_equals_autograd_over_single_weights(
    distribution: Distribution, backend: str, hard: bool
) -> None:
    logits, weight, grad = problem()
    site = Site(P48, Placement.whole(ROWS, GROUPS), distribution)
    logits = logits[:, : site.logits_per_group].clone().requires_grad_()
    sample, coef = Sample(NoiseKey(1, 2, 3, 4), kappa=200.0, tau=0.7, hard=hard), 0.3
    sampler = sampler_at(site, backend)
    sink = GradientSink(norm_coef=coef)
    masked, sums, codes = sample_mask(logits, weight, site, sample, sampler, sink, statistics=True)
    masked.backward(grad)

    wide = logits.detach().double().requires_grad_()
    soft = soft_mask(wide, site, sample)
    best = distribution.hard_mask(scores(wide.detach(), site.of_units, sample), P48.units)
    mask = soft + (best.double() - soft).detach() if hard else soft
    expected = weight.double() * mask.repeat_interleave(2, 1)
    norm = expected.square().sum()
    ((expected * grad.double()).sum() - coef * norm).backward()
    expected, norm = expected.detach(), norm.detach()
    assert wide.grad is not None and logits.grad is not None
    # fp32 noise and exponentials, as test_backends.py bounds them for single weights
    scale = float(wide.grad.abs().max())
    assert float((masked.double() - expected).abs().max()) < 1e-4 * float(weight.abs().max())
    assert float((logits.grad - wide.grad).abs().max()) < 2e-4 * scale
    assert float(sums[0]) == pytest.approx(float(norm), rel=1e-4)
    assert torch.equal(site.mask_of(codes), distribution.hard_mask(logits.detach(), P48))
    if hard:
        kept = masked != 0
        assert torch.equal(kept, P48.expand(best) & (weight != 0)) and P48.already_fits(masked)
    # without the term of the norm, and with the gradient of one weight of a pair alone
    for wrong_grad, wrong_coef in ((grad, 0.0), (grad * torch.tensor([1.0, 0.0]).repeat(40), coef)):
        wrong = sampler.backward(
            wrong_grad, logits.detach(), weight, site, sample, GradientSink(wrong_coef)
        )
        assert float((wrong - wide.grad).abs().max()) > 1e-2 * scale


@BOTH
def test_a_prior_of_pairs_is_the_prior_of_their_units(distribution: Distribution) -> None:
    """Logits of a prior, their hard mask and their scores are those of 2:4 on the units."""
    score_OU = torch.randn(ROWS, 4 * GROUPS, generator=torch.Generator().manual_seed(2))
    mask_OU = Pattern(2, 4).best(score_OU)
    degree_OU = torch.rand(score_OU.shape)
    for prior_OU in (mask_OU, degree_OU):
        logits = distribution.prior_bonus(P48.expand(prior_OU), P48, 3.0, 0.01, 1.0)
        single = distribution.prior_bonus(prior_OU, P48.units, 3.0, 0.01, 1.0)
        torch.testing.assert_close(logits, single)
        hard_OU = distribution.hard_mask(logits, P48.units)
        assert torch.equal(distribution.hard_mask(logits, P48), P48.expand(hard_OU))
        found = distribution.scores(logits, P48)
        assert torch.equal(found, P48.expand(distribution.scores(logits, P48.units)))
        assert torch.equal(P48.best(found), P48.expand(hard_OU))
    assert distribution.logits_per_group(P48) == distribution.logits_per_group(P48.units)
    assert distribution.noise_unit(P48) == distribution.noise_unit(P48.units)
    # the margins of a pair are those of its sum
    codes_OU = to_codes(score_OU, mask_OU, P48.units)
    halves_OI = P48.expand(score_OU / 2)
    assert torch.equal(to_codes(halves_OI, P48.expand(mask_OU), P48), P48.expand(codes_OU))
