"""A snapshot or a weights folder from a stranger runs nothing, in any verb that opens it."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.program import in_process, refusal


class Payload:
    """Unpickled, it makes the folder that it was given."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def poison(folder: Path, target: Path) -> None:
    """Put a payload into the index of a checkpoint that stays readable otherwise."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Payload(target)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    ("verb", "setting"),
    [
        ("evaluate", "evaluate.masks={{theirs: {snapshot}}}"),
        ("learn", "learn.prior.mask={snapshot}"),
        ("export", "export.mask={snapshot}"),
    ],
)
def test_a_payload_in_a_snapshot_never_runs(
    verb: str,
    setting: str,
    general: Path,
    run_dir: Path,
    settings: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    snapshot = Path(
        shutil.copytree(general / "learn/snapshots/step-00000004", tmp_path / "step-00000004")
    )
    target = tmp_path / "made-by-the-payload"
    poison(snapshot, target)
    done = in_process(verb, *settings(run_dir), setting.format(snapshot=snapshot))
    assert "which no tensor needs" in refusal(done)
    assert not target.exists()


@pytest.mark.parametrize("verb", ["prune", "evaluate", "learn"])
def test_a_payload_in_a_weights_folder_never_runs(
    verb: str, run_dir: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    target = tmp_path / "made-by-the-payload"
    poison(run_dir / "weights", target)
    shutil.rmtree(run_dir / "masks") if verb == "prune" else None
    done = in_process(verb, *settings(run_dir))
    assert "which no tensor needs" in refusal(done)
    assert not target.exists()
