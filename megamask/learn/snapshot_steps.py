"""The names of snapshots."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{8})$")


def snapshot_steps(folder: Path) -> list[int]:
    """Steps of the finished snapshots in ``folder``, ascending."""
    found = (path for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(match[1]) for path in found if (match := _NAME.search(path.name)))
