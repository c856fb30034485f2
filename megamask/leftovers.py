"""Temporary names, and what killed processes left under such names.

A temporary name says what process it belongs to, so that a later run can delete the names of
processes that were killed, and leaves the names of living processes alone.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from megamask.liveness import boot_id, lives, number_space, start_of

MAX_NAME = 150  # bytes of a name within a temporary name; file systems take 255 in all
FOREIGN_AGE = 24 * 3600.0  # seconds after which a temporary name of another machine is left over
_OWNER = re.compile(r"\.megamask-([0-9a-f]{6})-(\d+)-(\d*)-[0-9a-f]{4}\.tmp$")


def temporary_name(path: Path) -> Path:
    """A new hidden name beside ``path``, which says what process it belongs to."""
    number = uuid.uuid4().hex[:4]
    start = start_of(os.getpid())
    owner = f"megamask-{_machine()}-{os.getpid()}-{start}"
    return path.with_name(f".{_short(path.name)}.{owner}-{number}.tmp")


def remove_leftovers(folder: Path, is_alone: bool = False) -> None:
    """Delete the temporary names that killed processes left in ``folder``.

    Args:
        folder: where to look.
        is_alone: whether no other process writes into the folder, so that every temporary name is
            left over. Otherwise a name of a living process stays, and a young name of another
            machine.
    """
    for left in folder.glob(".*.tmp"):
        if is_alone or _is_dead(left):
            _remove(left)


def remove_leftovers_of(path: Path) -> None:
    """As ``remove_leftovers``, of the output ``path`` alone."""
    for left in path.parent.glob(f".{glob.escape(_short(path.name))}.*.tmp"):
        if _is_dead(left):
            _remove(left)


def _remove(left: Path) -> None:
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        with suppress(OSError):
            left.unlink()


def _is_dead(left: Path) -> bool:
    """Whether no process writes the temporary name ``left`` any more."""
    owner = _OWNER.search(left.name)
    if owner is None:
        return False
    if owner[1] == _machine():
        return not lives(int(owner[2]), owner[3])
    try:
        newest = max(one.lstat().st_mtime for one in (left, *left.rglob("*")))
    except OSError:  # it is being written or deleted just now
        return False
    return time.time() - newest > FOREIGN_AGE


def _machine() -> str:
    """This running system and, in a container, this container: its processes have numbers of their
    own. Machines may share a name; the names of an earlier start are those of another machine.
    """
    return hashlib.sha256(f"{boot_id()} {number_space()}".encode()).hexdigest()[:6]


def _short(name: str) -> str:
    """The name, or a digest of it where the temporary name would become too long."""
    is_long = len(os.fsencode(name)) > MAX_NAME
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16] if is_long else name
