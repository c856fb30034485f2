"""The files that belong to the program and are no Python: recipes, launch scripts, pinned versions.

They stand in the repository, and setup.py copies them into the wheel, so that an installed megamask
has them too.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_COPIES = _PACKAGE / "shipped_files"  # in a wheel alone


def shipped(relative: str) -> Path:
    """Path of a file or folder.

    Args:
        relative: its place in the repository, such as ``configs/recipes``.
    """
    return (_COPIES if _COPIES.is_dir() else _PACKAGE.parent) / relative
