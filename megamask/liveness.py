"""Which processes live. The number of a process alone does not say: the system gives numbers out
again, and a container has numbers of its own.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

ENDED = "ended"  # what ``start_of`` says of a process that only waits for its parent's word


def lives(process: int, start: str) -> bool:
    """Whether the process that started at ``start`` is there.

    Args:
        process: its number, in the container of this process.
        start: what ``start_of`` said of it. Where the system does not say, the number decides.
    """
    if process <= 0:  # to signal such a number would be to signal a group of processes
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        pass
    found = start_of(process)
    return found != ENDED and found in ("", start)


def start_of(process: int) -> str:
    """When a process started, in ticks since the boot; empty where the system does not say."""
    try:
        state, *facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return ENDED if state in "ZX" else facts[18]


def number_space() -> str:
    """What numbers of processes hold in: the same text in all processes of one container."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def boot_id() -> str:
    """Identity of the running system, the same in all of its containers. Hosts may share a name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
