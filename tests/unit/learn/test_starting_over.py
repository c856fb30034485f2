"""learn.resume=false: which snapshots are put aside, and which starts go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.learn.gumbel import GradientLearner
from megamask.learn.snapshot import LAUNCH, STARTED_OVER, Progress, Snapshots
from megamask.masks.times import write_seconds
from tests.unit.learn.one_rank import tiny_config, tiny_masked_model


def test_a_launch_starts_over_once_and_its_later_starts_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeue and a restart repeat the settings. Whatever the first start reached, the first
    start that gets this far puts the snapshots of the run before aside, and no later start does.
    """
    folder = tmp_path / "snapshots"

    def left(number: int) -> list[str]:
        aside = tmp_path / f"snapshots-before-{number}"
        return sorted(path.name for path in aside.glob("step-*"))

    config = tiny_config({"resume": False})
    with tiny_masked_model(config) as (mesh, masked_model):
        learner = GradientLearner(config, mesh, masked_model)
        mask = tmp_path / "masks" / "learned.safetensors"
        best = mask.with_name("learned-best.safetensors")
        snapshots = Snapshots(folder, config, mesh, masked_model, learner, masks=[mask, best])
        snapshots.save(Progress(step=5))
        mask.parent.mkdir()
        for path in (mask, best):
            path.write_text(path.name)
            write_seconds(path, 1.0)

        about = ("metrics.jsonl", "config.yaml", "versions.json")
        for name in about:
            (tmp_path / name).write_text(name)
        monkeypatch.setenv(LAUNCH, "slurm.here.7")
        assert snapshots.restore() == Progress() and left(1) == ["step-00000005"]
        assert not list(mask.parent.iterdir())  # the new run has no mask yet
        aside = tmp_path / "snapshots-before-1"
        assert [(aside / name).read_text() for name in about] == [*about]
        assert not any((tmp_path / name).exists() for name in about)
        assert (aside / mask.name).read_text() == mask.name
        ends = (".safetensors", ".times.json")
        names = sorted(path.name for path in aside.iterdir() if path.name.endswith(ends))
        assert names == sorted(f"{one.stem}{end}" for one in (mask, best) for end in ends)
        mask.write_text("of this run")
        assert snapshots.restore() == Progress() and not left(2)  # nothing was saved meanwhile
        snapshots.save(Progress(step=1))
        assert snapshots.restore().step == 1 and not left(2)
        assert mask.read_text() == "of this run"

        monkeypatch.setenv(LAUNCH, "slurm.here.8")  # another job with the same setting
        assert snapshots.restore() == Progress() and left(2) == ["step-00000001"]
        snapshots.save(Progress(step=2))

        monkeypatch.delenv(LAUNCH)  # each start by hand is a launch of its own
        for number in (3, 4):
            assert snapshots.restore() == Progress() and left(number)
            snapshots.save(Progress(step=3))
        assert not mask.exists() and not (tmp_path / "snapshots-before-3" / mask.name).exists()
        monkeypatch.setenv(LAUNCH, "slurm.here.8")  # whose snapshots are aside by now
        assert snapshots.restore() == Progress() and left(5)

        (folder / STARTED_OVER).write_text("torn {")
        snapshots.save(Progress(step=4))
        assert snapshots.restore() == Progress() and left(6) == ["step-00000004"]
        monkeypatch.delenv(LAUNCH)
        best.write_text("a run that was killed before its first snapshot")
        assert snapshots.restore() == Progress() and not left(7)
        assert not best.exists() and (tmp_path / "snapshots-before-7" / best.name).exists()
