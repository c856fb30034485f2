"""Verbs of megamask as child processes, with a time limit and a lock on the run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from megamask.errors import EXIT_INTERRUPTED

REPO = Path(__file__).resolve().parents[1]
GRACE = 600.0  # seconds that a verb has to save a snapshot and exit
AGAIN = "Run the same command again to go on."


class ArmError(Exception):
    """An arm did not reach its end; the other arms go on."""


class ElsewhereError(ArmError):
    """Another process works on this arm."""


def heed_sigterm() -> None:
    """Let SIGTERM end a study as Ctrl-C does, so that its verb is told to save and leave, and does
    not go on alone.
    """
    signal.signal(signal.SIGTERM, _as_keyboard_interrupt)


def link(target: Path, place: Path) -> None:
    """Make a symbolic link at ``place``, unless something is there; a broken link is replaced.

    Raises:
        ArmError: a link to another target is there: what was made beside it belongs to that target.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() and place.exists() and place.resolve() != target.resolve():
        raise ArmError(
            f"{place} is of {place.resolve()}, not of {target.resolve()}. Set another --out."
        )
    if not place.exists():
        place.unlink(missing_ok=True)
        place.symlink_to(target.resolve())


@contextlib.contextmanager
def locked(run_dir: Path, wait: bool = False) -> Iterator[int]:
    """Lock ``run_dir`` against other processes.

    The verbs inherit the lock, so a verb that outlives a killed script still holds it.

    Raises:
        ElsewhereError: another process holds the lock, and ``wait`` is off.
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
    """Run ``python -m megamask NAME`` to its end, with its output in ``run_dir``/NAME.txt.

    Raises:
        ArmError: the verb failed, or was not done in time; learning has saved a snapshot by then.
        KeyboardInterrupt: raised again after the verb has saved a snapshot and exited.
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
        text = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        last = text[-1] if text else ""
        raise ArmError(f"{name} ended with code {code}: {last} (all of it: {output})")


def _as_keyboard_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
