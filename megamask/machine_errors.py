"""Errors of the machine in words: disks that are full or closed, paths that lead nowhere, memory
that is short.

Python, PyTorch, safetensors and Megatron-Core each report such an error in their own way. This
module finds the error of the operating system in all of them, and makes one message of it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError, MegamaskError

SPACE = "Free some space there, or point the output at another disk; then run the same command."
PERMISSION = "Ask for permission to it, or choose another place."
_FIXES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "Raise the largest size of a file (ulimit -f); then run the same command.",
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: PERMISSION,
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.ENOTDIR: "A part of the path is a file: correct the path.",
    errno.EISDIR: "Choose the name of a file, not of a folder.",
    errno.ENOTEMPTY: "Choose another name, or remove what is there.",
    errno.EEXIST: "Choose another name, or remove what is there.",
    errno.ELOOP: "Remove the links that lead to each other.",
    errno.EMFILE: "Raise the number of open files (ulimit -n); then run the same command.",
    errno.ENFILE: "Close other programs; then run the same command.",
}
# Trouble of a network, a disk or a busy machine, which the same command may not meet again.
_PASSING = {
    number
    for number, name in errno.errorcode.items()
    if name
    in {
        "EAGAIN", "EBUSY", "ECOMM", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN",
        "EHOSTUNREACH", "EINTR", "EIO", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOLINK", "ENOMEM",
        "ENOTCONN", "EPROTO", "EREMOTEIO", "ESHUTDOWN", "ESTALE", "ETIMEDOUT",
    }
}  # fmt: skip
CHECK = "Check the path and its disk; then run the same command."
# What the system reports without a file name when a write fails.
_OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
# What PyTorch's and numpy's writers say when fewer bytes were written than were given.
_TORN_WRITE = re.compile(r"inline_container|\d+ requested and \d+ written")
_NO_MEMORY = re.compile("can't allocate memory|Unable to allocate|out of memory", re.IGNORECASE)


class MemoryShortError(MegamaskError):
    """The machine does not have the memory that was asked for."""


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Tell an error of the disk within the block as an error of ``path``.

    Args:
        path: the output, as the user named it.
        temporary: where the output is while it is written.

    Raises:
        ArtifactError: the disk is full, the place is not writable, and the like.
    """
    try:
        yield
    except MegamaskError:
        raise
    except BaseException as error:  # the exception of PyTorch's checkpoints is no Exception
        told = _of_write(error, path, temporary or path)
        if told is None:
            raise
        raise told from error


@contextmanager
def reading(path: Path, fix: str = "") -> Iterator[None]:
    """Tell an error of the disk within the block as an error of ``path``.

    Args:
        path: the input.
        fix: what the user can do; empty = by the kind of the error.

    Raises:
        ArtifactError: the file is missing, a folder, not readable, and the like.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(path, "is missing", fix or CHECK) from error
    except OSError as error:
        told = f"cannot be read ({error.strerror or error})"
        raise ArtifactError(path, told, fix or _FIXES.get(error.errno or 0, CHECK)) from error


def refused(error: BaseException) -> str:
    """The system's words for an input that is there and may not be read; empty for other errors."""
    number = number_of(error)
    return os.strerror(number) if number in (errno.EACCES, errno.EPERM) else ""


def explained(error: BaseException) -> MegamaskError | None:
    """The message for an error of the disk or of the memory; None for any other error."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    ):
        first = (str(error).splitlines() or [""])[0][:200]
        fix = "Lower the micro-batch or the length of the sequences, or use more processes."
        return MemoryShortError(
            f"the memory does not hold what the settings ask for ({first}). {fix}"
        )
    number = number_of(error)
    name = _file_of(error, number)
    if name is None and number in (*_OF_WRITES, errno.EPIPE):
        return _told("an output", "cannot be written", number)
    if number is None or name is None:
        return None
    return _told(os.fsdecode(name), "cannot be used", number)


def may_pass(error: BaseException | None) -> bool:
    """Whether an error comes from trouble of the machine that the same command may not meet again:
    a launcher starts it again, where it gives up after a mistake of the user.
    """
    while error is not None:
        if number_of(error) in _PASSING:
            return True
        error = error.__cause__
    return False


def number_of(error: BaseException) -> int | None:
    """The number (errno) of the system's error behind an error of a library; None without one."""
    failures = getattr(error, "failures", None)  # of the ranks of a checkpoint
    if isinstance(failures, dict) and failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := _NUMBER.search(text):
        return int(found[1] or found[2])
    if _TORN_WRITE.search(text):
        return errno.ENOSPC
    return None if error.__cause__ is None else number_of(error.__cause__)


def _file_of(error: BaseException, number: int | None) -> Any:
    """The file that an error is about. shutil's copies name source and target, and a target is what
    cannot grow. (A device that fails, EIO, can be either's.)
    """
    target = getattr(error, "filename2", None)
    if target is not None and number in _OF_WRITES and number != errno.EIO:
        return target
    return getattr(error, "filename", None)


def _of_write(error: BaseException, path: Path, temporary: Path) -> ArtifactError | None:
    number = number_of(error)
    name = _file_of(error, number)
    if number is None or isinstance(error, KeyboardInterrupt):
        return None
    if name is None:
        known = not isinstance(error, OSError) or number in _OF_WRITES
        return _told(str(path), "cannot be written", number) if known else None
    name = os.fsdecode(name)
    own = (*path.parents, *temporary.parents)
    # whole names: models/llama is no part of models/llama-8b
    if Path(name) in own or any(Path(name).is_relative_to(one) for one in (temporary, path)):
        return _told(str(path), "cannot be written", number)
    return _told(name, "cannot be used", number)  # an input that was read in the block


def _told(path: str, problem: str, number: int) -> ArtifactError:
    return ArtifactError(path, f"{problem} ({os.strerror(number)})", _FIXES.get(number, CHECK))
