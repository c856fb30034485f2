"""What each step draws, and the ways in which scale, temperature and weight norm go from their
first to their last value.
"""

from __future__ import annotations

from collections.abc import Callable

from megamask.config import Config
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey


def between(first_last: tuple[float, float], progress: float) -> float:
    """From the first to the last value, linear in progress, which is held in [0, 1] (MaskLLM,
    Table 7: kappa and tau).
    """
    first, last = first_last
    return first + (last - first) * min(max(progress, 0.0), 1.0)


def by_equal_factors(first_last: tuple[float, float], progress: float) -> float:
    """From the first to the last value, both above 0, by the same factor in each step
    (arXiv 2608.23048: kappa and tau). Progress is held in [0, 1].
    """
    first, last = first_last
    held = min(max(progress, 0.0), 1.0)
    return float(first ** (1 - held) * last**held)


# learn.sampling.schedule -> the path from the first to the last value
PATHS: dict[str, Callable[[tuple[float, float], float], float]] = {
    "linear": between,
    "exponential": by_equal_factors,
}


def sample_of(config: Config, step: int) -> Sample:
    """What ``step`` (counted from 0) draws."""
    sampling = config.learn.sampling
    progress = step / (sampling.annealed_by * config.learn.steps)
    path = PATHS[sampling.schedule]
    return Sample(
        key=NoiseKey(config.seed, step),
        kappa=path(sampling.kappa, progress),
        tau=path(sampling.tau, progress),
        hard=sampling.mode == "hard",
        noise=sampling.noise,
    )
