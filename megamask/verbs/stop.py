"""The verb stop: let a learning run save a snapshot and end, and its job end for good."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

from megamask.config import Config
from megamask.errors import ArtifactError
from megamask.launch import slurm
from megamask.launch.launch_folder import Launch, launches
from megamask.machine_errors import PERMISSION, writing
from megamask.process.holder import Holder
from megamask.process.lock import writer_of
from megamask.process.signals import STOP_FILE
from megamask.terminal import tell
from megamask.verbs.own_arguments import StopArguments
from megamask.verbs.status import paths_of


def run(config: Config, arguments: StopArguments) -> None:
    """Ask, and say what was asked. The run itself ends after the step that it is in.

    Raises:
        ArtifactError: nothing runs or waits on the run folder, or Slurm refused.
    """
    paths = paths_of(config)
    holder = writer_of(paths.learn)
    said = [line for launch in launches(paths.run_dir) for line in _end_job(launch, bool(holder))]
    if holder is not None:
        submitted = {launch.job for launch in launches(paths.run_dir)}
        if holder.job and holder.job not in submitted and slurm.find_job(holder.job):
            slurm.forbid_requeue(holder.job)
        with writing(paths.learn / STOP_FILE):
            (paths.learn / STOP_FILE).write_text("")
        said.append(f"{holder} saves after its step and ends")
    if not said:
        raise ArtifactError(paths.run_dir, "nothing runs on it and nothing waits", "Nothing to do.")
    tell("\n".join(said))


def _end_job(launch: Launch, is_learning: bool) -> Iterator[str]:
    """End what a launch started, unless it is the learning run that will see the file STOP."""
    sees_file = is_learning and launch.verb == "learn"
    is_running = launch.process and launch.is_running() and not sees_file
    if launch.process and is_running and _end(launch.process):
        yield f"{launch.process} was told to end"
    queued = slurm.find_job(launch.job) if launch.job else None
    if queued is None:
        return
    if queued.is_waiting:
        slurm.cancel(queued.number)
        yield f"{queued} is cancelled; what it saved before stays"
        return
    slurm.forbid_requeue(queued.number)
    if not sees_file:
        slurm.end_processes(queued.number)
        yield f"{queued} was told to end"


def _end(process: Holder) -> bool:
    """Send SIGTERM to a process of this machine; False where it has ended just now.

    Raises:
        ArtifactError: the process belongs to another user.
    """
    try:
        os.kill(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    except OSError as error:
        problem = f"cannot be told to end ({error.strerror})"
        raise ArtifactError(str(process), problem, PERMISSION) from error
    return True
