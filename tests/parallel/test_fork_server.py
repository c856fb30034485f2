"""The fork server: a child has what a fresh process has, ends as a process ends, and leaves nobody
behind.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.fork_server import Child, ForkServer, child_environment, fork_server

Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """``start(function, *args)`` in a child that works in ``tmp_path`` and writes ``out`` and
    ``err`` there.
    """

    def started(function: Callable[..., int], *args: Any, **variables: str) -> Child:
        environment = child_environment()
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            return fork_server(environment).call(
                f"{__name__}:{function.__name__}",
                *args,
                stdout=out,
                stderr=err,
                environment=environment | variables,
                cwd=tmp_path,
            )

    return started


def describe(word: str) -> int:
    """Print what a program sees of its surroundings."""
    print(word, os.getcwd(), os.environ["COLOUR"], sys.stdin.read(), threading.active_count())
    print(random.random(), numpy.random.random(), "torch" in sys.modules, file=sys.stderr)
    return 7


def raise_an_error() -> int:
    raise ValueError("no")


def fork_a_sleeper() -> int:
    """Leave a process of the group behind, and print its number."""
    sleeper = subprocess.Popen(["sleep", "600"])
    print(sleeper.pid, flush=True)
    return 0


def sleep_after_a_fork() -> int:
    fork_a_sleeper()
    time.sleep(600)
    return 0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def lives(pid: int) -> bool:
    """Whether a process runs; an ended one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_a_child_sees_its_own_surroundings(start: Start, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        child = start(describe, "word", COLOUR="green")
        assert child.wait(60) == child.poll() == 7
        child.close()
        assert (tmp_path / "out").read_text() == f"word {tmp_path} green  1\n"
        found.append((tmp_path / "err").read_text().split())
    (first, first_of_numpy, _), (second, second_of_numpy, has_torch) = found
    # each child has random numbers of its own
    assert first != second and first_of_numpy != second_of_numpy
    assert has_torch == "True"


def test_an_error_is_printed_and_is_an_exit_code(start: Start, tmp_path: Path) -> None:
    child = start(raise_an_error)
    assert child.wait(60) == 1
    child.close()
    assert (tmp_path / "err").read_text().endswith("ValueError: no\n")


def test_a_signal_is_the_exit_code_and_reaches_the_group(start: Start, tmp_path: Path) -> None:
    child = start(sleep_after_a_fork)
    wait_until(lambda: (tmp_path / "out").read_text().endswith("\n"))
    sleeper = int((tmp_path / "out").read_text())
    assert child.poll() is None and lives(sleeper)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.1)
    child.signal_group(signal.SIGTERM)
    assert child.wait(60) == -signal.SIGTERM
    wait_until(lambda: not lives(sleeper))
    child.close()


def test_closing_kills_what_a_child_left_behind(start: Start, tmp_path: Path) -> None:
    child = start(fork_a_sleeper)
    assert child.wait(60) == 0
    sleeper = int((tmp_path / "out").read_text())
    assert lives(sleeper)
    child.close()
    wait_until(lambda: not lives(sleeper))


def test_a_server_ends_with_its_connection_and_takes_the_children_along(tmp_path: Path) -> None:
    environment = child_environment()
    server = ForkServer(environment, preloaded=())
    with (tmp_path / "out").open("wb") as out:
        child = server.call(
            f"{__name__}:sleep_after_a_fork",
            stdout=out,
            stderr=out,
            environment=environment,
            cwd=tmp_path,
        )
    wait_until(lambda: (tmp_path / "out").read_text().endswith("\n"))
    sleeper = int((tmp_path / "out").read_text())
    server.close()
    wait_until(lambda: not lives(sleeper) and not lives(child.pid))


def test_a_module_that_cannot_be_imported_fails_in_the_child(tmp_path: Path) -> None:
    """The server lives on, and the child tells the error of the module."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('broken on purpose')\n")
    environment = child_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    server = ForkServer(environment)
    codes = []
    with (tmp_path / "err").open("wb") as err:
        for target in ("tests.parallel.tiny:config_of", f"{__name__}:raise_an_error"):
            child = server.call(
                target, stdout=err, stderr=err, environment=environment, cwd=tmp_path
            )
            codes.append(child.wait(60))
            child.close()
    server.close()
    assert codes == [1, 1]
    said = (tmp_path / "err").read_text()
    assert "RuntimeError: broken on purpose" in said and "ValueError: no" in said
