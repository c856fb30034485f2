"""Words of logs: lengths of time, and which steps of long work are told."""

from __future__ import annotations

import pytest

from megamask.terminal import duration, is_reported


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (273_700, "3d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("total", "told"),
    [(1, [1]), (3, [1, 2, 3]), (32, [4, 8, 12, 16, 20, 24, 28, 32]), (23, [*range(3, 23, 3), 23])],
)
def test_a_tenth_of_the_parts_and_the_last_are_reported(total: int, told: list[int]) -> None:
    assert [number for number in range(1, total + 1) if is_reported(number, total)] == told
