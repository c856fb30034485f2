"""A signal at any moment ends a verb with one message and its code, and leaves files whole."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
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
    """The verb is stopped at a moment of chance, and done again: everything is there."""
    run_dir = tmp_path / "run"
    given = [*settings(run_dir), "export.mask=magnitude", "prune.methods=[magnitude, sparsegpt]"]
    for needed in ("weights", "shards", "masks") if verb in ("evaluate", "export") else ():
        shutil.copytree(prepared / needed, run_dir / needed)
    if verb == "prune":
        for needed in ("weights", "shards"):
            shutil.copytree(prepared / needed, run_dir / needed)
    before, choose = contents(run_dir), random.Random(f"{SEED} {verb}")
    number = choose.choice(SIGNALS)
    with Program(verb, *given) as program:
        program.wait_until(lambda: any(run_dir.rglob(".*.lock")))
        time.sleep(choose.uniform(0, 0.6))
        program.process.send_signal(number)
        finished = program.wait()
    # The verb may be done already, and main() too, which was called like any function here.
    if finished.code not in (0, -number):
        assert_stopped(finished, verb, number)
    assert_untouched(run_dir, before)
    assert not left_behind(run_dir)
    here(verb, *given)
    assert not left_behind(run_dir)
