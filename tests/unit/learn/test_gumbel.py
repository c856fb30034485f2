"""The schedules of a step: their ends, their middle, their clamps."""

from __future__ import annotations

import pytest

from megamask.config import load_config
from megamask.learn.annealing import between, by_equal_factors, sample_of
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


def test_equal_factors() -> None:
    """Halfway lies the geometric mean; the ends are exact."""
    pair = (1.0, 500.0)
    assert [by_equal_factors(pair, progress) for progress in (-1, 0, 1, 2)] == [1, 1, 500, 500]
    assert by_equal_factors(pair, 0.5) == pytest.approx(500**0.5, rel=1e-15)  # a rounding or two
    thirds = [by_equal_factors((1.0, 0.05), step / 3) for step in range(4)]
    factors = [later / earlier for earlier, later in zip(thirds, thirds[1:], strict=False)]
    assert factors == pytest.approx([0.05 ** (1 / 3)] * 3, rel=1e-14)
    assert thirds[1] != pytest.approx(between((1.0, 0.05), 1 / 3), rel=0.1)


def test_annealing_that_ends_before_the_run() -> None:
    words = ["learn.steps=100", "learn.sampling.annealed_by=0.75"]
    early = load_config(None, [*words, "learn.sampling.schedule=exponential"])
    kappas = [sample_of(early, step).kappa for step in (0, 30, 75, 99)]
    assert kappas[0] == 100 and kappas[2:] == [500, 500]
    assert kappas[1] == pytest.approx(100 * 5**0.4, rel=1e-14)
    taus = [sample_of(load_config(None, words), step).tau for step in (0, 30, 75, 99)]
    # 1 - 0.95 has a rounding of 1, 1.1e-16, against 0.05
    assert taus == pytest.approx([1, 1 - 0.95 * 0.4, 0.05, 0.05], rel=1e-14)
