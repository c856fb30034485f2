"""The folders of snapshots: ``step-NNNNNNNN``, one for each snapshot of a run."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"step-([0-9]{8})")


def snapshot_path(folder: Path, step: int) -> Path:
    """The snapshot after ``step`` steps, among the snapshots of a run in ``folder``."""
    return folder / f"step-{step:08d}"


def snapshot_step(path: Path) -> int | None:
    """The steps that the name of a snapshot says; None for every other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def snapshot_steps(folder: Path) -> list[int]:
    """Steps of the finished snapshots in ``folder``, ascending."""
    steps = (snapshot_step(path) for path in folder.glob("step-*") if path.is_dir())
    return sorted(step for step in steps if step is not None)
