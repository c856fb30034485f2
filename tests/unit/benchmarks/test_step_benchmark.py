"""The benchmark of a step measures the run that its settings ask for."""

from __future__ import annotations

import pytest

from benchmarks import step
from benchmarks.lab import open_lab
from megamask.learn.metrics.mask_stats import MaskStatistics

WORDS = ("--device", "cpu", "--threads", "1", "--model", "toy", "--micro", "1", "--seq", "16")


@pytest.mark.parametrize("tracks", [True, False])
def test_flips_are_tracked_where_the_run_tracks_them(
    tracks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lean state keeps no hard masks: their bytes and seconds would be those of another run."""
    made: list[MaskStatistics] = []

    class Recorded(MaskStatistics):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(step, "MaskStatistics", Recorded)
    monkeypatch.setattr(step, "PART_ROUNDS", 1)
    options = step.read_options([*WORDS, f"learn.state.track_flips={tracks}".lower()])
    with open_lab(options, steps=4) as lab:
        step.measure(lab, 1, with_eager=False)
    assert [one.initial is not None for one in made] == [tracks]
