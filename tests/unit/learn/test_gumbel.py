"""The schedules of a step: their ends, their middle, their clamps."""

from __future__ import annotations

import pytest

from megamask.config import load_config
from megamask.learn.gumbel import between, sample_of
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey


@pytest.mark.parametrize(
    ("progress", "kappa", "tau"),
    [(0, 100, 4), (0.5, 300, 2.025), (1, 500, 0.05), (1.5, 500, 0.05), (-1, 100, 4)],
)
def test_kappa_rises_and_tau_falls(progress: float, kappa: float, tau: float) -> None:
    assert between((100, 500), progress) == pytest.approx(kappa, rel=1e-15)
    assert between((4, 0.05), progress) == pytest.approx(
        tau, rel=1e-14
    )  # 4 - 3.95: one rounding of 4, 4.4e-16, against 0.05


def test_a_step_draws_what_the_settings_say() -> None:
    words = ["seed=5", "learn.steps=10", "learn.sampling.mode=hard", "learn.sampling.noise=0.25"]
    sample = sample_of(load_config(None, words), 5)
    assert sample == Sample(NoiseKey(5, 5), 300.0, sample.tau, hard=True, noise=0.25)
    assert sample.tau == pytest.approx(0.525, rel=1e-15)
    assert sample_of(load_config(), 0).noise == 0
    for method in ("categorical", "maskpro"):
        assert sample_of(load_config(None, [f"learn.method={method}"]), 0).noise == 1


def test_weight_norm_is_constant_or_falls_to_zero() -> None:
    constant, falling = (
        [between(pair, progress) for progress in (0, 0.5, 1)] for pair in ((1e-5, 1e-5), (1e-5, 0))
    )
    assert constant == [1e-5, 1e-5, 1e-5] and falling == [1e-5, 0.5e-5, 0]
