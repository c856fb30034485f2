"""The folder that a verb writes a model into, and may replace: it holds what an earlier run wrote,
and neither the base model nor anything else of the user's.
"""

from __future__ import annotations

from pathlib import Path

from megamask.errors import ArtifactError, ConfigError
from megamask.storage import read_object, real_path, require_writable
from megamask.weights.base_model import BaseModel


def check_output(out: Path, stamp: str, key: str, base: BaseModel | None = None) -> None:
    """Check that a folder can be written and may be replaced, before any long work.

    Args:
        out: the folder; it may be missing, empty, or the output of an earlier run.
        stamp: name of the file that an earlier run left in its output, with ``own_files``. In the
            stamp of a version without that list, files newer than the stamp are others.
        key: the setting that chose the folder, for the message.
        base: the base model, which the output is made from, if there is one.

    Raises:
        ConfigError: the folder is a folder of the base model.
        ArtifactError: the folder holds other files, of which the first three are named, or it
            cannot be written.
    """
    sources = {} if base is None else {"model.hf": base.hf_dir, "model.megatron": base.megatron}
    for name, folder in sources.items():
        if folder is not None and real_path(out) == real_path(folder):
            fix = "The base model must stay as it is."
            raise ConfigError(key, str(out), f"a folder other than {name}", fix)
    _require_own(out, stamp, key)
    require_writable(out.parent, key)


def _require_own(out_dir: Path, stamp: str, key: str) -> None:
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
    """The part of a stamp that names the files of the folder, for ``check_output``."""
    return {"files": _files(folder)}


def _files(folder: Path) -> list[str]:
    """Everything below a folder but folders, by relative path."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
