"""Files and folders that are written whole or not at all.

Every output is written under a temporary name (``megamask.leftovers``) and renamed when it is
complete. Errors of the disk become one message (``megamask.machine_errors``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from megamask.errors import ArtifactError, ConfigError
from megamask.file_kinds import JSON, require_file, wrong_file
from megamask.leftovers import remove_leftovers, remove_leftovers_of, temporary_name
from megamask.machine_errors import reading, writing
from megamask.process.signals import held

# key -> type of its value, several types, or the required keys of an object
Required: TypeAlias = Mapping[str, Any]
_HALF_LETTER = re.compile(r"\\u[dD][89a-fA-F]")  # what JSON may write and no text may hold
PARTIAL = ".partial"  # end of the name of a folder that a later run goes on with


def require_writable(folder: Path, key: str = "run_dir") -> None:
    """Make ``folder`` and write a probe file into it, before any long work.

    What a killed process left in the folder is deleted.

    Args:
        folder: the folder to make.
        key: the setting that chose the folder, for the message.

    Raises:
        ArtifactError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder / "probe")
        probe.write_bytes(b"")
        probe.unlink()
        remove_leftovers(folder)
    except OSError as error:
        raise ArtifactError(
            folder,
            f"cannot be written ({error.strerror})",
            f"Point {key} at a folder you can write.",
        ) from error


def require_file_place(file: Path, key: str) -> None:
    """Check that a file can be written, or written again, before any long work.

    Args:
        file: the file, which may be missing.
        key: the argument that named the file, for the message.

    Raises:
        ConfigError: a folder has that name.
        ArtifactError: the folder of the file cannot be made or written.
    """
    if file.is_dir():
        fix = "Name a file, in this folder or elsewhere."
        raise ConfigError(key, str(file), "a file, and this is a folder", fix)
    require_writable(file.parent, key)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` when the block succeeds.

    Where ``path`` is a symbolic link, the link stays and the file that it names is written.

    Raises:
        ArtifactError: the disk is full, or ``path`` cannot be written.
    """
    target, temporary = places(path)
    with writing(path, temporary):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers_of(target)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder, and rename it to ``path`` when the block succeeds.

    A folder that was at ``path`` before is replaced. Links and errors are as in ``atomic_file``.
    """
    target, temporary = places(path)
    with writing(path, temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers_of(target)
        temporary.mkdir()
        try:
            yield temporary
            commit_dir(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def continued_dir(path: Path, is_useful: Callable[[Path], bool]) -> Iterator[Path]:
    """As ``atomic_dir``, of a folder that a later run can go on with.

    The folder is written as ``.NAME.partial`` beside ``path``. The block finds there what a killed
    run left. After an error the folder stays if it is useful. No other process may write ``path``:
    the caller holds its lock.

    Args:
        path: the folder to write.
        is_useful: whether a later run can go on with a folder.
    """
    target, _ = places(path)
    folder = target.with_name(f".{target.name}{PARTIAL}")
    with writing(path, folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers_of(target)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
            commit_dir(folder, target)
        except BaseException:
            if not is_useful(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_partial(parent: Path, kept: Collection[str] = ()) -> None:
    """Delete the folders that killed runs left in ``parent`` for a run to go on with, but for those
    of the outputs named ``kept``.
    """
    for folder in parent.glob(f".*{PARTIAL}"):
        if folder.name not in {f".{name}{PARTIAL}" for name in kept}:
            shutil.rmtree(folder, ignore_errors=True)


def commit_dir(temporary: Path, path: Path) -> None:
    """Rename the finished folder ``temporary`` to ``path``, and delete the folder it replaces."""
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
    if path.exists():
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        old = temporary_name(path)
        with held():
            os.rename(path, old)
            os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, path)
    _sync(path.parent)


def real_path(path: Path) -> Path:
    """The absolute path without symbolic links. Links in a circle stay as they are, and whoever
    opens the path tells of them: ``Path.resolve`` raises RuntimeError up to Python 3.12.
    """
    return Path(os.path.realpath(path))


def target_of(path: Path) -> Path:
    """The path itself, or the place that it names where it is a symbolic link.

    An output behind a link stays on the disk that the link chose. The place may be missing.

    Raises:
        ArtifactError: the links lead in a circle.
    """
    if not path.is_symlink():
        return path
    target = real_path(path)
    if target.is_symlink():
        raise ArtifactError(path, "is a link that leads back to itself", "Remove the link.")
    return target


def places(path: Path) -> tuple[Path, Path]:
    """Where an output goes, and its temporary name beside that place.

    Raises:
        ArtifactError: the path is too long, its links lead in a circle, or it has no name of its
            own: ``.``, ``..`` and ``/``.
    """
    with writing(path):
        target = target_of(path)
        if target.name in ("", ".."):
            problem = f"cannot be written ({os.strerror(errno.EISDIR)})"
            raise ArtifactError(path, problem, "Choose a name within it.")
        return target, temporary_name(target)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Numbers that are not finite become null."""
    text = json.dumps(finite(value), indent=2, default=str, allow_nan=False)
    write_text(path, f"{text}\n")


def is_number(value: Any, above: float = -1e300) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number, and larger than ``above``."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and above < value < 1e300


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8. JSON can escape half a letter, which cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def finite(value: Any) -> Any:
    """``value`` with null for each number that is not finite: JSON has no word for those."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_read(value: Any) -> Any:
    """A JSON value as a file gives it back: tuples are lists, and keys are texts."""
    return json.loads(json.dumps(value))


def read_json(path: Path, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        fix: the action that makes the file, for the message.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        require_file(path, JSON, fix)
        with reading(path, fix):
            text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if _HALF_LETTER.search(text) and not is_text(json.dumps(value, ensure_ascii=False)):
            raise ValueError("it holds half a letter (a lone surrogate)")
        return value
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise wrong_file(path, JSON, fix, error) from error


def read_object(path: Path, fix: str, required: Required) -> dict[str, Any]:
    """Read a JSON object and check that it holds what is needed.

    Args:
        path: the file.
        fix: the action that makes the file, for the message.
        required: key -> the type of its value, a tuple of types, or the required keys of an object.

    Raises:
        ArtifactError: the file is missing or is no such object; the message names the key.
    """
    value = read_json(path, fix)
    if problem := lacks(value, required):
        raise ArtifactError(path, problem, fix)
    found: dict[str, Any] = value
    return found


def lacks(value: Any, required: Required, where: str = "") -> str:
    """The first thing that a JSON value lacks of what is required; empty if nothing is missing."""
    if not isinstance(value, dict):
        return f"holds {type(value).__name__} instead of an object{where and f' at {where}'}"
    for key, kind in required.items():
        place = f"{where}.{key}" if where else key
        if key not in value:
            return f"has no {place}"
        if isinstance(kind, Mapping):
            if problem := lacks(value[key], kind, place):
                return problem
        # True is an int in Python; in JSON it is no number
        elif not isinstance(value[key], kind) or (
            isinstance(value[key], bool) and kind in (int, float, (int, float))
        ):
            return f"holds {type(value[key]).__name__} at {place}"
    return ""


def file_sha256(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
