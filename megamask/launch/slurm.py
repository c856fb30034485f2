"""Slurm, through its commands."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import ArtifactError, ConfigError

TIMEOUT = 60.0  # seconds; a busy controller answers late
TIMED_OUT = "timed out"  # what sbatch says where the job may be in the queue all the same
UNKNOWN_JOB = "invalid job id"  # what squeue says of a job that has left the queue for long


@dataclass(frozen=True)
class QueuedJob:
    """A job that is in the queue.

    Attributes:
        number: of the job.
        state: as ``PENDING`` or ``RUNNING``.
        reason: why it waits; ``None`` as text where it does not.
        nodes: that it runs on; empty while it waits.
        start: when it started or is expected to start; ``N/A`` where that is unknown.
    """

    number: str
    state: str
    reason: str
    nodes: str
    start: str

    @property
    def is_waiting(self) -> bool:
        """Whether the job has no processes, so that there is nothing to save. A suspended job has
        processes, which hold steps that no snapshot has.
        """
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else f" ({self.reason})"
        return f"Slurm job {self.number}, {self.state}{where}"


class JobRefusedError(ArtifactError):
    """Slurm refused a job, so that there is none."""


def has_slurm() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def submit(script: Path) -> str:
    """Submit a job script.

    Returns:
        The number of the job.

    Raises:
        ConfigError: there is no sbatch here.
        JobRefusedError: sbatch refused the script.
        ArtifactError: sbatch gave no answer, so that nobody knows.
    """
    done = _call("sbatch", "--parsable", str(script))
    if done is None:
        fix = "Submit on a login node, or set launch.launcher=torchrun."
        raise ConfigError("launch.launcher", "slurm", "needs the command sbatch", fix)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"code {done.returncode}"
        if TIMED_OUT in said.lower():
            fix = "Look at the queue, and start again when Slurm answers."
            raise ArtifactError(script, f"may be in the queue or not: sbatch failed ({said})", fix)
        raise JobRefusedError(script, f"was refused ({said})", "Correct launch.* and submit again.")
    return done.stdout.strip().partition(";")[0]  # "12;cluster"


def find_job(number: str) -> QueuedJob | None:
    """The job; None if it is not in the queue of the cluster that this machine submits to, or if
    this machine submits to none.

    Raises:
        ArtifactError: squeue failed, so that nobody knows.
    """
    done = _call("squeue", "--noheader", "--jobs", number, "--format", "%T|%r|%N|%S")
    if done is None or UNKNOWN_JOB in done.stderr.lower():
        return None
    if done.returncode == 0 and not done.stdout.strip():
        return None
    words = done.stdout.strip().partition("\n")[0].split("|")
    if done.returncode != 0 or len(words) != 4:
        said = " ".join(done.stderr.split()) or done.stdout.strip() or f"code {done.returncode}"
        problem = f"may wait or not: squeue failed ({said[:300]})"
        raise ArtifactError(f"Slurm job {number}", problem, "Start again when Slurm answers.")
    return QueuedJob(number, *words)


def forbid_requeue(number: str) -> None:
    """Let the end of the job's processes be the end of the job.

    Raises:
        ArtifactError: Slurm refused or gave no answer.
    """
    _order(number, "scontrol", "update", f"JobId={number}", "Requeue=0")


def cancel(number: str) -> None:
    """Take the job out of the queue.

    Raises:
        ArtifactError: Slurm refused or gave no answer.
    """
    _order(number, "scancel", number)


def end_processes(number: str) -> None:
    """Send SIGTERM to the processes of a job; its script goes on.

    Raises:
        ArtifactError: Slurm refused or gave no answer.
    """
    _order(number, "scancel", "--signal=TERM", number)


def _order(number: str, *command: str) -> None:
    done = _call(*command)
    if done is None or done.returncode != 0:
        said = "there is no such command" if done is None else " ".join(done.stderr.split())
        line = " ".join(command)
        raise ArtifactError(f"Slurm job {number}", f"{line} failed ({said})", "Try it yourself.")


def _call(*command: str) -> subprocess.CompletedProcess[str] | None:
    """The finished command; None where there is no such command.

    Raises:
        ArtifactError: the command cannot be started, or gives no answer.
    """
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        is_late = isinstance(error, subprocess.TimeoutExpired)
        said = f"gave no answer within {TIMEOUT:g} seconds" if is_late else f"failed ({error})"
        fix = "Look at the queue, and start again when Slurm answers."
        raise ArtifactError(f"the command {command[0]}", said, fix) from error
