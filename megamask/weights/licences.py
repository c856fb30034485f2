"""The licence of a model goes where its weights go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_NAME = re.compile(
    r"licen[cs]e|notice|copying|(^|[-_. ])(terms|eula|use[-_ ]policy)", re.IGNORECASE
)
LIMIT = 2**20  # bytes; larger files are no licences


def is_licence(name: str) -> bool:
    """Whether a file of that name states a licence, its terms or its notices."""
    return _NAME.search(name) is not None


def copy_licences(source: Path, target: Path) -> list[str]:
    """Copy the licence files of folder ``source`` into folder ``target``; returns their names. A
    folder that does not exist has none.
    """
    found = [
        path
        for path in (sorted(source.iterdir()) if source.is_dir() else [])
        if is_licence(path.name) and path.is_file() and path.stat().st_size <= LIMIT
    ]
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]
