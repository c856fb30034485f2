"""A distribution is found by its object alone: one without fused kernels runs in plain PyTorch."""

from __future__ import annotations

import importlib
import logging
from importlib.util import find_spec

import pytest
import torch

from megamask.sparsity.backends import choose_backend
from megamask.sparsity.categorical.categorical import CATEGORICAL, Categorical
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.draw import Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask, sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.masks import is_valid


class Foreign(Categorical):
    """The categorical distribution without its fused kernels."""

    name = "foreign"
    numba = None
    triton = None


def test_a_distribution_without_kernels_runs_in_plain_pytorch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    foreign, cpu = Foreign(), torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        backend = choose_backend("auto", cpu, foreign)
    assert backend == "torch" and "no kernels of the foreign distribution" in caplog.text
    generator = torch.Generator().manual_seed(0)
    logits = 0.01 * torch.randn(4, 6, 5, generator=generator)
    weight = torch.randn(4, 20, generator=generator)
    sample = Sample(NoiseKey(1, 2), kappa=100.0, tau=1.0)
    masked = [
        sample_mask(
            logits,
            weight,
            Site(Pattern(2, 4), Placement.whole(4, 5), one),
            sample,
            sampler_for("torch", one),
        ).masked
        for one in (foreign, CATEGORICAL)
    ]
    assert torch.equal(*masked)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=str)
def test_hard_codes_and_logits_tell_the_same_mask(distribution: Distribution) -> None:
    pattern = Pattern(2, 4)
    site = Site(pattern, Placement.whole(8, 5), distribution)
    logits = torch.randn(8, site.logits_per_group, 5, generator=torch.Generator().manual_seed(0))
    codes, _ = sampler_for("torch", distribution).mask_statistics(logits, site, 100.0)
    mask = distribution.hard_mask(logits, pattern)
    assert codes.dtype == site.code_dtype == distribution.code_dtype(pattern)
    assert torch.equal(site.mask_of(codes), mask) and is_valid(pattern, mask)
    # the largest logits, written out
    if site.logits_per_group == pattern.m:
        kept = logits.topk(pattern.n, dim=1).indices
        expected = torch.zeros(8, 4, 5, dtype=torch.bool).scatter(1, kept, True)
        assert torch.equal(mask, expected.transpose(1, 2).flatten(1))
    else:
        assert torch.equal(pattern.index_of(mask), logits.argmax(1))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=str)
def test_the_modules_that_a_distribution_names_exist(distribution: Distribution) -> None:
    assert DISTRIBUTIONS[distribution.name] is distribution
    reference = importlib.import_module(distribution.reference)
    assert all(hasattr(reference, name) for name in ("forward", "backward", "mask_statistics"))
    for module in (distribution.numba, distribution.triton):
        assert module is None or find_spec(module) is not None
