"""Starting megamask's verbs as processes: a time limit, a lock on the run directory, and signals
passed on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megamask.errors import EXIT_INTERRUPTED

REPO = Path(__file__).resolve().parents[2]
GRACE = 600.0  # seconds that a verb gets to save a snapshot and leave
AGAIN = "Run the same command again to go on."


class ArmError(Exception):
    """An arm that did not get to its end; the others go on."""


class ElsewhereError(ArmError):
    """Another process works on this arm."""


def link(target: Path, place: Path) -> None:
    """A symbolic link, unless something is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        place.unlink(missing_ok=True)
        place.symlink_to(target.resolve())


@contextlib.contextmanager
def locked(run_dir: Path, wait: bool = False) -> Iterator[int]:
    """Keep other processes off ``run_dir``. The verbs inherit the lock: one that outlives a killed
    script still holds it.

    Raises:
        ElsewhereError: it is taken, and ``wait`` is off.
    """
    with (run_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ElsewhereError(f"{run_dir}: another process works there") from None
        yield file.fileno()


def verb(
    name: str, recipe: Path, overrides: list[str], run_dir: Path, minutes: float, lock: int
) -> None:
    """Run ``python -m megamask NAME`` to its end, its output to ``run_dir``/NAME.txt.

    Raises:
        ArmError: it failed, or was not done in time; a learning run has saved a snapshot by then.
        KeyboardInterrupt: passed on, after it has saved and left.
    """
    command = [sys.executable, "-m", "megamask", name, "--config", str(recipe), *overrides]
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    output = run_dir / f"{name}.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=REPO,
            start_new_session=True,
            pass_fds=(lock,),
        )
    try:
        code = process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        _stop(process)
        raise ArmError(f"{name} was not done after {minutes:g} minutes. {AGAIN}") from None
    except BaseException:
        _stop(process)
        raise
    if code == EXIT_INTERRUPTED:
        raise ArmError(f"{name} was asked to leave, and saved. {AGAIN}")
    if code:
        last = [line for line in output.read_text(errors="replace").splitlines() if line.strip()][
            -1:
        ]
        raise ArmError(f"{name} ended with code {code}: {''.join(last)} (all of it: {output})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
