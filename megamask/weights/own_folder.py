"""A folder that a verb may replace holds what an earlier run wrote, and nothing of the user's."""

from __future__ import annotations

from pathlib import Path

from megamask.errors import ArtifactError
from megamask.storage import read_object


def require_own(out_dir: Path, stamp: str, key: str) -> None:
    """Check that a folder may be replaced.

    Args:
        out_dir: the folder; it may be missing, empty, or the output of an earlier run.
        stamp: name of the file that an earlier run left in its output, with ``own_files``. In the
            stamp of a version without that list, files newer than the stamp are others.
        key: the setting that chose the folder, for the message.

    Raises:
        ArtifactError: the folder holds other files; the first three are named.
    """
    if not out_dir.exists():
        return
    others = _files(out_dir) if out_dir.is_dir() else [out_dir.name]
    if (out_dir / stamp).is_file():
        note = read_object(out_dir / stamp, f"Remove {out_dir}.", {})
        own, age = note.get("files"), (out_dir / stamp).stat().st_mtime_ns
        if isinstance(own, list):
            others = sorted({*others} - {stamp, *(one for one in own if isinstance(one, str))})
        else:
            others = [one for one in others if (out_dir / one).lstat().st_mtime_ns > age]
    if others:
        raise ArtifactError(
            out_dir,
            f"holds files that this verb did not make, and would replace: {', '.join(others[:3])}",
            f"Remove them, or point {key} elsewhere.",
        )


def own_files(folder: Path) -> dict[str, list[str]]:
    """The part of a stamp that names the files of the folder, for ``require_own``."""
    return {"files": _files(folder)}


def _files(folder: Path) -> list[str]:
    """Everything below a folder but folders, by relative path."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
