"""Schedules of the sampling: functions of progress in [0, 1] and nothing else."""

from __future__ import annotations


def linear(first_last: tuple[float, float], progress: float) -> float:
    """From the first to the last value, linear in progress (MaskLLM, Table 7: kappa and tau)."""
    first, last = first_last
    return first + (last - first) * min(max(progress, 0.0), 1.0)
