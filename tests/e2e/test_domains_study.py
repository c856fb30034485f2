"""The study of domains with megamask's real verbs, on the tiny model."""

from __future__ import annotations

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
from megamask.storage import read_json
from studies.child import locked
from tests.e2e.program import RECIPE, TIMEOUT
from tests.fork_server import ROOT

# The rules of a study are tested in tests/unit/studies.
STARTS = ("scratch", "transfer")
pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def test_each_domain_gets_two_masks(
    prepared: Path, model: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "hf").symlink_to(model)
    (base / "weights").symlink_to(prepared / "weights")
    command = [
        *(sys.executable, "-m", "studies.domains", "--base", str(base), "--out", str(out)),
        *("--recipe", str(RECIPE), "--steps", "2", "prune.methods=[sparsegpt]"),
        *settings(prepared)[1:],
    ]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, cwd=ROOT, env=quiet) as script:
        try:
            wait_for(script, out, "all-*/tokenize.txt")
            script.send_signal(signal.SIGTERM)
            assert script.wait(TIMEOUT) == EXIT_INTERRUPTED
        finally:
            script.kill()
    (general,) = out.glob("all-*")
    with locked(general):  # the verb has left too
        pass
    assert subprocess.run(command, cwd=ROOT, env=quiet).returncode == EXIT_OK
    masks = {
        name: load_masks(next(out.glob(name)) / "masks" / "learned.safetensors")
        for name in ("all-*", *(f"{one}-*/{at}" for one in ("prose", "code") for at in STARTS))
    }
    assert len({tuple(mask.index(name).sum() for name in mask) for mask in masks.values()}) == 5
    found = {one["domain"]: one["perplexity"] for one in read_json(out / "domains.json", "")}
    assert list(found) == ["prose", "code"]
    for values in found.values():
        assert list(values) == ["dense", "sparsegpt", "general", "scratch", "transfer"]
        assert len(set(values.values())) == 5 and min(values.values()) > 1


def wait_for(script: subprocess.Popen[bytes], folder: Path, pattern: str) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and script.poll() is None:
        if any(folder.glob(pattern)):
            return
        time.sleep(0.01)
    raise AssertionError(f"the script made no {pattern}")
