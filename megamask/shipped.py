"""What belongs to the program beside its modules: recipes, launch scripts, pinned versions, and the
commit that the program is of.

The files stand in the repository, and setup.py copies them into the wheel, so that an installed
megamask has them too.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_COPIES = _PACKAGE / "shipped_files"  # in a wheel alone


def shipped(relative: str) -> Path:
    """Path of a file or folder.

    Args:
        relative: its place in the repository, such as ``configs/recipes``.
    """
    return (_COPIES if _COPIES.is_dir() else _PACKAGE.parent) / relative


COMMIT_FILE = "COMMIT"  # beside a copy of the package, which has no repository


def source_commit() -> str | None:
    """The commit of the program, with ``-dirty`` where tracked files differ from the commit; None
    where nothing tells.
    """
    root = _PACKAGE.parent
    try:
        if (root / COMMIT_FILE).exists():
            return (root / COMMIT_FILE).read_text().strip() or None
        if not (root / ".git").exists():
            return None
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit


def _git(root: Path, *words: str) -> str:
    answer = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return answer.stdout.strip()
