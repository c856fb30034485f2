"""Who holds a lock or writes a heartbeat, in words that a person can act upon."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

from megamask.liveness import boot_id, lives, number_space, start_of


@dataclass(frozen=True)
class Holder:
    """A process, named so that another process, on another host too, can find and judge it.

    Attributes:
        what: the command, such as ``megamask learn``.
        host: name of the host.
        machine: identity of the running system and of the container. Hosts may share a name, a host
            that started again has none of the processes of before, and a container has numbers of
            its own.
        pid: number of the process on its machine.
        job: number of the Slurm job; None outside Slurm.
        since: when the process took what it holds, UTC, in ISO form.
        start: when the process started (``megamask.liveness.start_of``): the number is given out
            again after its end. Empty in notes of versions that did not know; such a process counts
            as ended where the system can say when a process started.
    """

    what: str
    host: str
    machine: str
    pid: int
    job: str | None
    since: str
    start: str = ""

    @classmethod
    def this_process(cls, what: str) -> Holder:
        """The process that calls."""
        pid = os.getpid()
        return cls(what, socket.gethostname(), _machine(), pid, job_id(), utc_now(), start_of(pid))

    @classmethod
    def read(cls, value: object) -> Holder | None:
        """From a JSON value; None where the value describes no process."""
        kinds = {"what": str, "host": str, "machine": str, "pid": int, "since": str}
        if not isinstance(value, dict):
            return None
        if any(type(value.get(key)) is not kind for key, kind in kinds.items()):
            return None
        job, start = value.get("job"), value.get("start")
        found = {key: value[key] for key in kinds}
        return cls(
            **found,
            job=job if isinstance(job, str) else None,
            start=start if isinstance(start, str) else "",
        )

    def is_here(self) -> bool:
        """Whether the process is or was one of this running system and container."""
        return self.machine == _machine()

    def shares_kernel(self) -> bool:
        """Whether the process is or was one of this running system, in any container."""
        return self.machine.partition(" ")[0] == boot_id()

    def is_running(self) -> bool:
        """Whether the process runs; only to be asked where ``is_here()``."""
        return lives(self.pid, self.start)

    def is_process_of(self, other: Holder) -> bool:
        """Whether both are one process, whatever it holds."""
        mine, theirs = ((one.machine, one.pid, one.start) for one in (self, other))
        return mine == theirs

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
    return f"{boot_id()} {number_space()}"
