"""The study of learners with megamask's real verbs: a signal saves a snapshot, and the same command
goes on to the result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask import load_masks
from megamask.errors import EXIT_INTERRUPTED, EXIT_OK
from megamask.report.reading import read_metrics
from tests.e2e.program import RECIPE, TIMEOUT
from tests.fork_server import ROOT

# The rules of a study are tested in tests/unit/studies.
pytestmark = [pytest.mark.slow, pytest.mark.nightly]

STEPS = 150  # about 20 ms each: enough for a signal to come in time


def test_a_signal_saves_and_the_same_command_goes_on(
    prepared: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folders = [
        "--base",
        str(prepared),
        "--out",
        str(out),
        "--recipe",
        str(RECIPE),
        "--arms",
        "subset-2of4",
    ]
    budget = [
        "--steps",
        str(STEPS),
        "--micro-batch",
        "2",
        "--tokens-per-step",
        "128",
        "--evaluate-tokens",
        "128",
        "--seeds",
        "7",
    ]
    command = [
        sys.executable,
        "-m",
        "studies.learners",
        *folders,
        *budget,
        "learn.snapshot.every=1000",
        *settings(prepared)[1:],
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    ) as script:
        try:
            run_dir = wait_for_step(script, out, 3)
            script.send_signal(signal.SIGTERM)
            assert script.wait(TIMEOUT) == EXIT_INTERRUPTED
        finally:
            script.kill()
    saved = sorted((run_dir / "learn" / "snapshots").glob("step-*"))
    assert len(saved) == 1 and not (run_dir / "learned.json").exists()

    assert subprocess.run(command, cwd=ROOT, timeout=2 * TIMEOUT).returncode == EXIT_OK
    steps = [
        record["step"]
        for record in read_metrics(run_dir / "learn" / "metrics.jsonl")
        if record["kind"] == "train"
    ]
    assert steps == list(range(1, STEPS + 1))
    assert (
        f"resumed after step {int(saved[0].name.removeprefix('step-'))} "
        in (run_dir / "learn" / "log.txt").read_text()
    )
    mask = load_masks(run_dir / "masks" / "learned.safetensors")
    result = json.loads((run_dir / "result.json").read_text())
    assert mask.meta["evaluation"]["step"] == result["steps"] == STEPS
    assert result["perplexity"].keys() == {"dense", "learned"} and result["perplexity"][
        "learned"
    ].keys() == {"prose", "code"}
    assert "| subset, a logit per weight " in (out / "learners.md").read_text()


def wait_for_step(script: subprocess.Popen[bytes], out: Path, step: int) -> Path:
    end = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < end and script.poll() is None:
        for path in out.glob("runs/*/*/learn/metrics.jsonl"):
            if any(
                record["kind"] == "train" and record["step"] >= step
                for record in read_metrics(path)
            ):
                return path.parent.parent
        time.sleep(0.01)
    raise AssertionError("the script took no steps")
