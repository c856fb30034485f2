"""Learning with HybridModel: the golden masks, and snapshots that either class goes on from, also
where GPTModel was deleted.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask import load_masks
from megamask.model.model_class import VARIABLE
from tests.e2e.golden.runs import (
    ALLOWED,
    COMMON,
    LONG,
    METHODS,
    SHORT,
    path,
    same_machine,
    share_that_differs,
)
from tests.e2e.program import RECIPE, TIMEOUT, in_process
from tests.fork_server import ROOT, child_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.core.models.hybrid") is None,
        reason="this Megatron-Core has no HybridModel",
    ),
]
Settings = Callable[[Path], list[str]]


def without_gpt(*words: str) -> None:
    """Learn on a Megatron-Core whose GPTModel was deleted."""
    command = [sys.executable, "-m", "tests.e2e.without_gpt", "learn", "--config", str(RECIPE)]
    done = subprocess.run(
        [*command, *words],
        env=child_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_golden_masks_whatever_class_learns(
    run_dir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HybridModel learns the golden masks where GPTModel was deleted; GPTModel goes on from a
    snapshot of that run, and HybridModel from a snapshot of GPTModel.
    """
    steps, every, allowed = (LONG, 5, 0.0) if same_machine() else (SHORT, 1, ALLOWED)
    words = [*settings(run_dir), f"learn.steps={steps}", *COMMON, *METHODS["subset"]]
    words += [f"learn.snapshot.every={every}", "learn.snapshot.keep=9"]
    learned, folder = run_dir / "masks" / "learned.safetensors", run_dir / "learn"
    golden = load_masks(path("subset", steps))

    def go_on_after(step: int) -> None:
        learned.unlink()
        for later in range(step + every, steps + 1, every):
            shutil.rmtree(folder / "snapshots" / f"step-{later:08d}")
        (folder / "metrics.jsonl").unlink()
        assert in_process("learn", *words).code == 0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        assert records[0]["step"] == step + 1, "it began at the snapshot, not at the first step"

    without_gpt(*words)
    assert share_that_differs(load_masks(learned), golden) <= allowed
    go_on_after(steps // 2)
    assert share_that_differs(load_masks(learned), golden) <= allowed
    if every > 1:
        monkeypatch.setenv(VARIABLE, "hybrid")
        go_on_after(steps - every)
        assert share_that_differs(load_masks(learned), golden) <= allowed
