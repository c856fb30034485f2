"""Many samples: the mean soft mask against quadrature, hard masks against softmax(kappa pi),
through both backends.

One row of N groups with equal logits gives N independent samples. The seed is fixed, so a test
either always passes or never; the confidence says how unlikely a right sampler was to fail when the
seed was chosen.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch

from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Sample, Site, gumbel_noise
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.unit.sparsity.categorical.reference import candidate_table
from tests.unit.sparsity.samplers import FUSED

N = 60_000
KAPPA, TAU = 100.0, 0.7
LOGITS = torch.tensor(
    [0.012, -0.004, 0.0, 0.009, -0.015, 0.003]
)  # of one 2:4 group: kappa pi spans -1.5 .. 1.2
BACKENDS = [pytest.param(gumbel_softmax, id="torch"), pytest.param(FUSED, id="numba")]


def sample(
    backend: ModuleType,
    kappa: float = KAPPA,
    tau: float = TAU,
    hard: bool = False,
    sign: float = 1.0,
) -> np.ndarray:
    """Sampled masks, (N, 4)."""
    site, logits = (
        Site(Pattern(2, 4), Placement.whole(1, N), CATEGORICAL),
        sign * LOGITS[None, :, None].repeat(1, 1, N),
    )
    draw = Sample(NoiseKey(seed=99, step=1), kappa, tau, hard)
    masked, *_ = backend.forward(logits, torch.ones(1, 4 * N), site, draw)
    return masked.view(N, 4).double().numpy()


def expected_index(scores: np.ndarray, tau: float) -> np.ndarray:
    """E[softmax((scores + g) / tau)] for independent Gumbel g, by quadrature, (C,) fp64.

    1 / x = integral of e^(-s x) ds gives, given g_c, E[y_c] = integral e^(-s) prod_j phi(log s +
    (scores_j - scores_c - g_c) / tau) ds, with phi(t) = E[exp(-e^(t + g / tau))] of one Gumbel g.
    """
    g = np.linspace(-4.5, 40, 4000)
    density = np.exp(-g - np.exp(-g)) * (g[1] - g[0])
    t = np.linspace(-110, 60, 4000)
    phi = np.exp(-np.exp(np.minimum(t[:, None] + g / tau, 700))) @ density
    v = np.linspace(-25, 5, 700)[:, None]  # s = e^v
    outer, weight = g[None, ::6], density[None, ::6] * 6 * np.exp(v - np.exp(v)) * (v[1] - v[0])
    expected = []
    for c, own in enumerate(scores):
        product = np.ones((len(v), outer.shape[1]))
        for other in np.delete(scores, c):
            product *= np.interp(v + (other - own - outer) / tau, t, phi)
        expected.append(float((product * weight).sum()))
    return np.array(expected)


def deviations(masks: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance of the mean from ``expected`` in standard errors, per mask entry."""
    return np.abs(masks.mean(0) - expected) / (masks.std(0) / math.sqrt(len(masks)))


def test_the_quadrature_knows_what_is_known() -> None:
    # Equal scores: 1 / C by symmetry. Two scores at tau = 1: y = sigmoid(d + logistic noise), whose
    # mean is 1/2 at d = 0 and e^d (e^d - 1 - d) / (e^d - 1)^2 else. Tolerance: probabilities must
    # sum to 1 to within the grid's error, seen below 1e-4.
    np.testing.assert_allclose(expected_index(np.zeros(6), 0.7), 1 / 6, atol=1e-4)
    odds = math.exp(1.5)
    np.testing.assert_allclose(
        expected_index(np.array([1.5, 0.0]), 1.0)[0],
        odds * (odds - 1 - 1.5) / (odds - 1) ** 2,
        atol=1e-4,
    )
    np.testing.assert_allclose(expected_index(KAPPA * LOGITS.numpy(), TAU).sum(), 1, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_soft_mask_is_the_expectation(backend: ModuleType) -> None:
    expected = expected_index(KAPPA * LOGITS.double().numpy(), TAU) @ candidate_table(2, 4).numpy()
    # 5 standard errors in each of 4 entries: a right sampler fails once in 4e5. One is about 1e-3,
    # ten times the quadrature's error.
    assert deviations(sample(backend), expected).max() < 5
    for wrong in ({"sign": -1.0}, {"kappa": 1.0}, {"tau": 1.0}, {"hard": True}):
        assert deviations(sample(backend, **wrong), expected).max() > 8, f"{wrong} went unnoticed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_masks_are_drawn_with_probability_softmax_of_kappa_pi(backend: ModuleType) -> None:
    def chi_square(masks: np.ndarray) -> float:
        index = Pattern(2, 4).index_of(torch.from_numpy(masks)).flatten()
        return float(((torch.bincount(index, minlength=6) - expected).square() / expected).sum())

    expected = N * (KAPPA * LOGITS.double()).softmax(0)
    # Gumbel-max: the temperature must not matter. P(chi-square of 5 degrees of freedom > 35.9) =
    # 1e-6.
    assert chi_square(sample(backend, hard=True)) < 35.9
    assert chi_square(sample(backend, hard=True, tau=4.0)) < 35.9
    assert chi_square(sample(backend, hard=True, kappa=1.0)) > 100
    assert chi_square(sample(backend, hard=True, sign=-1.0)) > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_masks_become_hard_as_tau_falls(backend: ModuleType) -> None:
    hard = sample(backend, hard=True)
    distance = [
        float(np.abs(sample(backend, tau=tau) - hard).mean()) for tau in (4.0, 1.0, 0.25, 0.05)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.02


def test_neighbouring_keys_are_uncorrelated() -> None:
    site, logits = Site(Pattern(2, 4), Placement.whole(1, N), CATEGORICAL), torch.zeros(1, 6, N)
    first, *others = (
        gumbel_noise(site, Sample(key, 1, 1), N, "cpu", torch.float64).flatten()
        for key in (
            NoiseKey(1, 1),
            NoiseKey(2, 1),
            NoiseKey(1, 2),
            NoiseKey(1, 1, 1),
            NoiseKey(1, 1, 0, 1),
        )
    )
    assert logits.numel() == first.numel()
    for (
        other
    ) in others:  # correlation of 3.6e5 independent pairs: standard error 1.7e-3, five of them
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 5 * 1.7e-3
