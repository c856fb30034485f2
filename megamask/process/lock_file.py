"""The file of a lock: what the kernel says of it, and the lines of its holders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path

from megamask.leftovers import temporary_name
from megamask.process.holder import Holder

SILENCE = 60.0  # seconds without a touch, after which a holder on another host counts as gone
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
Lines = list[tuple[Holder, bool]]  # each holder, and whether it writes


class Kernel(Enum):
    """What the kernel says to the wish for a lock."""

    TAKEN = "taken"
    BUSY = "busy"
    ABSENT = "the file system has no such locks"


def flock(descriptor: int, kind: int) -> Kernel:
    """Ask the kernel for a lock of a kind of ``fcntl``, without waiting."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return Kernel.BUSY
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return Kernel.ABSENT
    return Kernel.TAKEN


def is_file(descriptor: int, lock: Path) -> bool:
    """Whether ``lock`` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def read_lines(descriptor: int) -> Lines:
    """The holders that the file names."""
    return lines_of(os.pread(descriptor, 2**20, 0))


def lines_of(content: bytes) -> Lines:
    """The holders in the content of a file; what is no line of a holder is passed over."""
    found: Lines = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):  # torn
            value = json.loads(line)
            if holder := Holder.read(value):
                found.append((holder, value.get("writes") is True))
    return found


def age_of(lock: Path) -> float:
    """Seconds since the file was touched, by the clock of its file server."""
    modified = lock.stat().st_mtime
    probe = temporary_name(lock.with_name(lock.name[1:].removesuffix(".lock")))
    try:
        probe.touch()
        return probe.stat().st_mtime - modified
    except OSError:
        return time.time() - modified
    finally:
        with contextlib.suppress(OSError):  # a file system that cannot be written
            probe.unlink(missing_ok=True)


def line_of(holder: Holder, is_writer: bool) -> bytes:
    """The line of a holder."""
    return json.dumps({**asdict(holder), "writes": is_writer}).encode() + b"\n"


def living(descriptor: int, lock: Path, state: Kernel) -> Lines:
    """The holders in the file that live, as far as this system can tell. What ``state`` says of
    processes of this system counts, for the kernel would have kept the lock from us.
    """
    age = age_of(lock)
    return [
        (one, writes)
        for one, writes in read_lines(descriptor)
        if not (state is Kernel.TAKEN and one.shares_kernel())
        and (one.is_running() if one.is_here() else age < SILENCE)
    ]


def cross_out(descriptor: int, lock: Path, holder: Holder, is_writer: bool) -> None:
    """Put blanks over the line of ``holder``, which others that still read would be told of."""
    line = line_of(holder, is_writer)
    place = os.pread(descriptor, 2**20, 0).find(line)
    if place >= 0 and is_file(descriptor, lock):
        with lock.open("r+b") as file:  # the descriptor appends, wherever it is told to write
            os.pwrite(file.fileno(), b" " * (len(line) - 1), place)
