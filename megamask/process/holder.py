"""Who holds a lock or writes a heartbeat, in words that a person can act upon."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """A process, named so that another process, on another host too, can find and judge it.

    Attributes:
        what: the command, such as ``megamask learn``.
        host: name of the host.
        machine: identity of the running system. Hosts may share a name, and a host that started
            again has none of the processes of before.
        pid: number of the process on its host.
        job: number of the Slurm job; None outside Slurm.
        since: when the process took what it holds, UTC, in ISO form.
    """

    what: str
    host: str
    machine: str
    pid: int
    job: str | None
    since: str

    @classmethod
    def this_process(cls, what: str) -> Holder:
        """The process that calls."""
        return cls(what, socket.gethostname(), _machine(), os.getpid(), job_id(), utc_now())

    @classmethod
    def read(cls, value: object) -> Holder | None:
        """From a JSON value; None where the value describes no process."""
        kinds = {"what": str, "host": str, "machine": str, "pid": int, "since": str}
        if not isinstance(value, dict):
            return None
        if any(type(value.get(key)) is not kind for key, kind in kinds.items()):
            return None
        job = value.get("job")
        found = {key: value[key] for key in kinds}
        return cls(**found, job=job if isinstance(job, str) else None)

    def is_here(self) -> bool:
        """Whether the process is or was one of this running system."""
        return self.machine == _machine()

    def is_running(self) -> bool:
        """Whether a process of this number runs; only to be asked where ``is_here()``."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # another user's process
            return True
        return True

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{self.what} (process {self.pid} on {self.host}{job}, since {self.since})"

    def how_to_end(self) -> str:
        """The command that ends the process in order."""
        return f"scancel {self.job}" if self.job else f"kill {self.pid} on {self.host}"


def job_id() -> str | None:
    """The Slurm job of this process; None outside Slurm."""
    return os.environ.get("SLURM_JOB_ID") or None


def utc_now() -> str:
    """The time, UTC, in ISO form to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
