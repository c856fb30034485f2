"""A signal at any moment ends a verb with one message and its code, and leaves files whole."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megamask.errors import EXIT_INTERRUPTED
from megamask.process.signals import SIGNALS
from tests.e2e.program import Finished, Program, assert_untouched, contents, here
from tests.e2e.test_ranks import left_behind

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]
SEED = 5


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal by now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, mask = line.partition(":")
        if name == "SigCgt":
            return bool(int(mask, 16) >> (number - 1) & 1)
    return False


def has_lock(run_dir: Path) -> bool:
    """Whether a verb is at work in a run folder."""
    return any(run_dir.rglob(".*.lock"))


def assert_stopped(finished: Finished, verb: str, number: signal.Signals) -> None:
    expected = EXIT_INTERRUPTED if verb == "learn" else 128 + number
    assert finished.code == expected, finished
    said = [line for line in finished.stderr.splitlines() if line.startswith("megamask: ")]
    assert len(said) == 1 and said[0].startswith(f"megamask: {number.name}: "), finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(("verb", "number"), [("learn", "SIGUSR1"), ("prune", "SIGTERM")])
def test_a_signal_before_anything_is_imported(
    verb: str, number: str, run_dir: Path, settings: Settings
) -> None:
    """The program starts, and its handlers stand long before torch is there."""
    before, name = contents(run_dir), signal.Signals[number]
    with Program(verb, *settings(run_dir), "prune.damp=0.02", fresh=True) as program:
        program.wait_until(lambda: catches(program.process.pid, name))
        program.process.send_signal(name)
        finished = program.wait()
    assert_stopped(finished, verb, name)
    assert_untouched(run_dir, before)
    assert not left_behind(run_dir)


@pytest.mark.parametrize("verb", ["convert", "tokenize", "prune", "evaluate", "export"])
def test_a_signal_in_the_middle(
    verb: str, prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    """The verb is stopped at a moment of chance, and done again: everything is there. Where chance
    comes too late, it gets half of the time.
    """
    run_dir = tmp_path / "run"
    given = [*settings(run_dir), "export.mask=magnitude", "prune.methods=[magnitude, sparsegpt]"]
    for needed in ("weights", "shards", "masks") if verb in ("evaluate", "export") else ():
        shutil.copytree(prepared / needed, run_dir / needed)
    if verb == "prune":
        for needed in ("weights", "shards"):
            shutil.copytree(prepared / needed, run_dir / needed)
    choose = random.Random(f"{SEED} {verb}")
    for most in (0.6, 0.3, 0.15, 0.07, 0.0):
        trial = tmp_path / f"{most}"
        if run_dir.exists():
            shutil.copytree(run_dir, trial)
        words = [word.replace(str(run_dir), str(trial)) for word in given]
        before, number = contents(trial), choose.choice(SIGNALS)
        with Program(verb, *words) as program:
            program.wait_until(partial(has_lock, trial))
            time.sleep(choose.uniform(0, most))
            program.process.send_signal(number)
            finished = program.wait()
        assert_untouched(trial, before)
        assert not left_behind(trial)
        # The verb may be done already, and main() too, which was called like any function here.
        if finished.code not in (0, -number):
            break
    assert_stopped(finished, verb, number)
    here(verb, *words)
    assert not left_behind(trial)
