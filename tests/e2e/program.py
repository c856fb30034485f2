"""Runs the program as a user does, in processes of its own with a time limit, after which the
whole process group is killed.

A process is a child of the fork server (``tests/fork_server.py``), which has imported torch and
Megatron-Core already; under torchrun, and where a test asks for ``fresh``, it is a new interpreter
with the command line that a user types.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megamask.__main__ import main
from megamask.errors import EXIT_USER_ERROR
from tests.fork_server import ROOT, Child, ForkServer, child_environment, fork_server
from tests.parallel.ranks import meet_again, run_ranks

RECIPE = ROOT / "configs" / "recipes" / "debug.yaml"
# A verb on the debug model takes a few seconds, and some more for the imports of a fresh process;
# the rest is room for a busy machine.
TIMEOUT = 120.0


@dataclass(frozen=True)
class Finished:
    """What a process left behind."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Program:
    """A running ``megamask VERB`` in its own process group; leaving the ``with`` block kills
    whatever is left of it.

    Args:
        verb: what to run, with the debug recipe.
        overrides: ``key=value`` words.
        launch: number of processes under torchrun; None = plain python.
        fresh: start a new interpreter, not a child of the fork server.
        host: the fork server of another host and the variables of a process there.
    """

    def __init__(
        self,
        verb: str,
        *overrides: str,
        launch: int | None = None,
        fresh: bool = False,
        host: tuple[ForkServer, dict[str, str]] | None = None,
    ) -> None:
        words = [verb, "--config", str(RECIPE), *overrides]
        self.what = " ".join(["megamask", verb, *overrides])
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - they live as long as the process
        self._begin = time.monotonic()
        self.process = self._start(words, launch) if launch or fresh else self._fork(words, host)

    def _start(self, words: list[str], launch: int | None) -> subprocess.Popen[bytes]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launch)]
        stdout, stderr = self._files
        return subprocess.Popen(
            [sys.executable, *(torchrun if launch else []), "-m", "megamask", *words],
            stdout=stdout,
            stderr=stderr,
            env=child_environment(),
            cwd=ROOT,
            start_new_session=True,
        )

    def _fork(self, words: list[str], host: tuple[ForkServer, dict[str, str]] | None) -> Child:
        stdout, stderr = self._files
        environment = child_environment()
        server, environment = host or (fork_server(environment), environment)
        return server.call(
            "tests.e2e.program:run_program",
            words,
            stdout=stdout,
            stderr=stderr,
            environment=environment,
            cwd=ROOT,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        """Wait for the end.

        Raises:
            AssertionError: it did not end in time.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"{self.what}: not done after {timeout:.0f} s\n{self._text(1)[-4000:]}"
            ) from None
        return Finished(code, self._text(0), self._text(1), time.monotonic() - self._begin)

    def wait_until(
        self, condition: Callable[[], bool], timeout: float = TIMEOUT, interval: float = 0.002
    ) -> None:
        """Poll ``condition`` while the program runs.

        Raises:
            AssertionError: the program ended, or the time was over, before the condition held.
        """
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                state = (
                    "running"
                    if self.process.poll() is None
                    else f"ended with {self.process.poll()}"
                )
                self.kill()
                raise AssertionError(
                    f"{self.what}: {state}, and what was waited for did not come\n"
                    f"{self._text(1)[-4000:]}"
                )
            time.sleep(interval)

    def _text(self, index: int) -> str:
        self._files[index].seek(0)
        return self._files[index].read()


def run_program(words: list[str]) -> int:
    """The program with ``words`` as its command line, which ends as a process of its own does."""
    sys.argv = ["megamask", *words]
    return main()


def megamask(
    verb: str,
    *overrides: str,
    fresh: bool = False,
    check: bool = True,
    timeout: float = TIMEOUT,
) -> Finished:
    """Run a verb to its end; ``check`` asserts that it succeeded."""
    with Program(verb, *overrides, fresh=fresh) as program:
        finished = program.wait(timeout)
    assert not check or finished.code == 0, (
        f"{program.what}: exit code {finished.code}\n{finished.stdout}\n{finished.stderr[-4000:]}"
    )
    return finished


def in_ranks(world: int, *commands: Sequence[str], timeout: float = TIMEOUT) -> None:
    """Run verbs with their overrides in turn on ``world`` ranks in the environment that torchrun
    gives, as children of the fork server; each verb must succeed on every rank.
    """
    run_ranks(_run_in_rank, world, commands, timeout=timeout)


def _run_in_rank(rank: int, commands: Sequence[Sequence[str]]) -> None:
    for verb, *overrides in commands:
        code = main([verb, "--config", str(RECIPE), *overrides])
        assert code == 0, f"megamask {verb} {overrides}: exit code {code}"
        meet_again()


def in_process(verb: str, *overrides: str) -> Finished:
    """Run a verb inside the test process: no start-up cost, for what does not depend on the process
    (refusals, second runs).
    """
    return command(verb, "--config", str(RECIPE), *overrides)


def command(*words: str) -> Finished:
    """Run the command line ``words`` of megamask inside the test process."""
    logger = logging.getLogger("megamask")
    before, level, begin = list(logger.handlers), logger.level, time.monotonic()
    threads = torch.get_num_threads()
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            warnings.catch_warnings(),
        ):
            code = main([*words])
    finally:
        logger.handlers = before
        logger.setLevel(level)
        torch.set_num_threads(threads)
    return Finished(code, stdout.getvalue(), stderr.getvalue(), time.monotonic() - begin)


def here(verb: str, *overrides: str) -> Finished:
    """Run a verb to its end inside the test process; it must succeed. Without the imports of a
    process a verb on the debug model takes a second.
    """
    finished = in_process(verb, *overrides)
    words = " ".join([verb, *overrides])
    assert finished.code == 0, f"megamask {words}: exit code {finished.code}\n{finished.stderr}"
    return finished


def refusal(finished: Finished) -> str:
    """The one message of a verb that refused to work; everything a user error must be, but for its
    words.
    """
    lines = [line for line in finished.stderr.splitlines() if line.startswith("megamask: error")]
    assert finished.code == EXIT_USER_ERROR, f"exit code {finished.code}\n{finished.stderr}"
    assert len(lines) == 1, finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    assert lines[0].endswith((".", "?")), f"the last sentence is the fix: {lines[0]}"
    return lines[0]


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def assert_untouched(folder: Path, before: dict[str, str]) -> None:
    """Everything that ``contents`` saw before is as it was; something new (an index of the shards)
    may have been added.
    """
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before
