"""A learning run in the background, as ``megamask submit`` starts it under torchrun."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.program import RECIPE, command, in_process, refusal

Settings = Callable[[Path], list[str]]
pytestmark = pytest.mark.slow


def status(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command("status", str(run_dir), "--json").stdout)
    return found


def wait_for(run_dir: Path, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    end = time.monotonic() + 240
    while not is_there(facts := status(run_dir)):
        log = run_dir / "launch/001/job.log"
        assert time.monotonic() < end, f"{facts}\n{log.read_text()[-3000:]}"
        time.sleep(0.1)
    return facts


def test_a_run_is_submitted_watched_refused_a_second_time_and_stopped(
    run_dir: Path, settings: Settings, request: pytest.FixtureRequest
) -> None:
    """torchrun starts the run and ends well. Whatever fails, no process outlives the test."""
    words = ["--config", str(RECIPE), *settings(run_dir), "launch.launcher=torchrun"]
    words += ["launch.retries=2", "learn.steps=100000", "learn.snapshot.every=100000"]
    request.addfinalizer(lambda: subprocess.run(["pkill", "-KILL", "-f", f"{run_dir}/"]))
    submitted = command("submit", *words)
    assert submitted.code == 0, submitted.stderr
    assert "learn of" in submitted.stdout and "job.log" in submitted.stdout
    try:
        facts = wait_for(run_dir, lambda facts: facts["alive"] and facts["step"] >= 3)
        assert facts["state"] in ("learning", "starting") and facts["seconds_per_step"] > 0
        message = refusal(in_process("submit", *words[2:]))
        assert "is being written by megamask learn" in message
    finally:
        stopped = command("stop", str(run_dir))
    assert stopped.code == 0 and "saves after its step" in stopped.stdout, stopped.stderr
    facts = wait_for(run_dir, lambda facts: not facts["alive"])
    log = (run_dir / "launch/001/job.log").read_text()
    # the snapshot is there, and torchrun, which may restart twice, took the end for an end
    assert f"megamask stop: saved at step {facts['snapshot']}" in log
    assert not (run_dir / "learn/STOP").exists() and "resumed after" not in log
    wait_for(run_dir, lambda facts: not facts["launch_alive"])
    again = command("stop", str(run_dir))
    assert again.code == 2 and "nothing runs on it" in again.stderr
