"""Draws without noise (``Sample.noise`` 0), in plain PyTorch and in the fused CPU kernels: exact
probabilities of the logits alone, whatever the key and the place.

Shapes: O out_features, I in_features, G groups per row, L logits a group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import GradientSink, Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset.subset import SUBSET
from tests.unit.sparsity.categorical import reference
from tests.unit.sparsity.samplers import FUSED, PLAIN, AnyDistribution
from tests.unit.sparsity.subset import subsets

ROWS, GROUPS = 6, 37
QUIET = Sample(NoiseKey(1, 2, 3, 4), kappa=100.0, tau=0.7, noise=0.0)
SINK = GradientSink(norm_coef=1e-2)
both = pytest.mark.parametrize("distribution", [CATEGORICAL, SUBSET], ids=str)
everywhere = pytest.mark.parametrize("backend", [PLAIN, FUSED], ids=["torch", "numba"])


def problem(
    distribution: Distribution, dtype: torch.dtype = torch.float32
) -> tuple[Site, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Site, logits (O, L, G), weight and gradient (O, I)."""
    site = Site(Pattern(2, 4), Placement.whole(ROWS, GROUPS), distribution)
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, site.logits_per_group, GROUPS)
    logits = 0.01 * torch.randn(shape, generator=generator, dtype=dtype)
    weight, grad = (
        torch.randn(ROWS, 4 * GROUPS, generator=generator, dtype=dtype) for _ in range(2)
    )
    return site, logits, weight, grad


def mask_of(site: Site, logits: torch.Tensor, draw: Sample) -> torch.Tensor:
    """The soft mask (O, I) written out a second time: all candidates, fp64."""
    silent = torch.zeros_like(logits, dtype=torch.float64)
    if site.distribution is SUBSET:
        return subsets.mask(logits, silent, 2, draw.kappa, draw.tau)
    return reference.mask(logits, silent, 2, 4, draw.kappa, draw.tau)


@everywhere
@both
def test_soft_masks_are_the_probabilities_of_the_logits(
    distribution: Distribution, backend: AnyDistribution
) -> None:
    site, logits, weight, _ = problem(distribution)
    ones = torch.ones_like(weight)
    found, expected = backend.forward(logits, ones, site, QUIET), mask_of(site, logits, QUIET)
    # Scores below 6 with a few roundings of 2^-24 each; a mask's slope by its score is 1/4 at most.
    torch.testing.assert_close(found.masked.double(), expected, rtol=0, atol=3e-6)
    loud = backend.forward(logits, ones, site, replace(QUIET, noise=0.01))
    assert float((loud.masked - found.masked).abs().max()) > 1e-3


@both
def test_the_gradient_is_that_of_the_exact_probabilities(distribution: Distribution) -> None:
    """Central differences of the soft masks of ``mask_of``, one logit of every group at a time."""
    site, logits, weight, grad = problem(distribution, torch.float64)
    draw, step = replace(QUIET, tau=2.0), 1e-5

    def loss(at: torch.Tensor) -> torch.Tensor:
        masked = weight * mask_of(site, at, draw)
        value = grad * masked - SINK.norm_coef * masked.square()
        return value.unflatten(1, (GROUPS, 4)).sum(2)  # of each group: groups are independent

    found = PLAIN.backward(grad, logits, weight, site, draw, SINK)
    for j in range(site.logits_per_group):
        away = torch.zeros_like(logits)
        away[:, j] = step
        slope = (loss(logits + away) - loss(logits - away)) / (2 * step)
        # Third derivatives of (kappa / tau)^3 times the loss's size, some 10, times step^2 / 6.
        torch.testing.assert_close(found[:, j], slope, rtol=0, atol=1e-4)
        assert float(slope.abs().max()) > 1


@everywhere
@both
@pytest.mark.parametrize("hard", [False, True])
def test_neither_key_nor_place_matters(
    distribution: Distribution, backend: AnyDistribution, hard: bool
) -> None:
    site, logits, weight, grad = problem(distribution)
    here, inputs = slice(3, 14), slice(12, 56)  # groups of every row, as another rank holds them
    elsewhere = replace(site, placement=Placement.whole(ROWS, 11))

    def of_shard(draw: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        some = (logits[..., here].contiguous(), weight[:, inputs], elsewhere, draw)
        return backend.forward(*some).masked, backend.backward(grad[:, inputs], *some, SINK)

    draw = replace(QUIET, hard=hard)
    masked = backend.forward(logits, weight, site, draw).masked
    gradient = backend.backward(grad, logits, weight, site, draw, SINK)
    other = replace(draw, key=NoiseKey(8, 9))
    found = of_shard(other)
    assert torch.equal(found[0], masked[:, inputs]) and torch.equal(found[1], gradient[..., here])
    loud = of_shard(replace(other, noise=1.0))
    assert not torch.equal(loud[0], found[0]) and not torch.equal(loud[1], found[1])


@both
def test_no_words_are_made(distribution: Distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("words without noise")

    monkeypatch.setattr("megamask.sparsity.draw.words", refuse)
    site, logits, weight, grad = problem(distribution)
    PLAIN.forward(logits, weight, site, QUIET, statistics=True)
    PLAIN.backward(grad, logits, weight, site, QUIET)
    with pytest.raises(AssertionError, match="words without noise"):
        PLAIN.forward(logits, weight, site, replace(QUIET, noise=0.1))


@everywhere
@both
def test_hard_masks_are_those_of_evaluations(
    distribution: Distribution, backend: AnyDistribution
) -> None:
    site, logits, weight, _ = problem(distribution)
    masked = backend.forward(logits, torch.ones_like(weight), site, replace(QUIET, hard=True))
    codes, _ = backend.mask_statistics(logits, site, QUIET.kappa)
    assert torch.equal(masked.masked.bool(), site.mask_of(codes))
