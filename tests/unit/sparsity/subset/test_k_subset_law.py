"""Which law hard masks are drawn from: categorical perturbs candidates, subset perturbs positions,
and these are two laws.

With candidate logits that are sums of position logits, categorical draws
P(S) ~ exp(kappa sum of pi); subset draws positions one after the other without replacement
(Plackett-Luce). Both by chi-square against exact enumeration, each against its own law and the
other's.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch

from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset import k_subset
from megamask.sparsity.subset.subset import SUBSET
from tests.unit.sparsity.samplers import FUSED
from tests.unit.sparsity.subset import subsets

N = 60_000  # independent groups with equal logits
KAPPA = 100.0
POSITIONS = torch.tensor([0.012, -0.004, 0.001, -0.015])  # kappa pi spans -1.5 .. 1.2
SETS = list(itertools.combinations(range(4), 2))


def counts(distribution: Distribution, backend: ModuleType, tau: float = 1.0) -> torch.Tensor:
    """How often each of the 6 candidates was drawn, by hard masks."""
    logits = (
        POSITIONS
        if distribution is SUBSET
        else torch.stack([POSITIONS[list(one)].sum() for one in SETS])
    )
    site = Site(Pattern(2, 4), Placement.whole(1, N), distribution)
    draw = Sample(NoiseKey(seed=99, step=1), KAPPA, tau, hard=True)
    masked = backend.forward(
        logits[None, :, None].repeat(1, 1, N), torch.ones(1, 4 * N), site, draw
    ).masked
    return torch.bincount(site.pattern.index_of(masked).flatten(), minlength=6).double()


def chi_square(found: torch.Tensor, probability: torch.Tensor) -> float:
    return float(((found - N * probability).square() / (N * probability)).sum())


LAWS = {
    "candidates": subsets.probabilities(KAPPA * POSITIONS.view(1, 4, 1), 2).flatten(),
    "positions": torch.tensor(
        [
            subsets.one_after_the_other((KAPPA * POSITIONS.double()).exp().tolist(), 2)[one]
            for one in SETS
        ]
    ).double(),
}


@pytest.mark.parametrize(
    ("distribution", "backend", "own"),
    [
        pytest.param(CATEGORICAL, gumbel_softmax, "candidates", id="categorical-torch"),
        pytest.param(CATEGORICAL, FUSED, "candidates", id="categorical-numba"),
        pytest.param(SUBSET, k_subset, "positions", id="subset-torch"),
        pytest.param(SUBSET, FUSED, "positions", id="subset-numba"),
    ],
)
def test_each_distribution_draws_its_law_and_not_the_other(
    distribution: Distribution, backend: ModuleType, own: str
) -> None:
    other = next(name for name in LAWS if name != own)
    assert all(float(law.sum()) == pytest.approx(1) for law in LAWS.values())
    for tau in (1.0, 4.0):  # the temperature must not matter
        found = counts(distribution, backend, tau)
        assert (
            chi_square(found, LAWS[own]) < 35.9
        )  # P(chi-square of 5 degrees of freedom > 35.9) = 1e-6
        assert chi_square(found, LAWS[other]) > 200


def test_both_laws_have_their_mode_at_the_hard_mask() -> None:
    site = Site(Pattern(2, 4), Placement.whole(1, 1), SUBSET)
    hard_codes, largest = k_subset.mask_statistics(POSITIONS.view(1, 4, 1), site, KAPPA)
    best = int(site.pattern.index_of(site.mask_of(hard_codes)))
    assert all(int(law.argmax()) == best for law in LAWS.values())
    assert float(largest) == pytest.approx(
        float(LAWS["candidates"].max()), rel=1e-5
    )  # statistics speak of the law that no noise enters
    assert float(largest) != pytest.approx(float(LAWS["positions"].max()), rel=1e-2)
