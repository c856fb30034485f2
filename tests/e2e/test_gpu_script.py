"""benchmarks/gpu.sh: all its parts at toy size on the CPU, and its refusal of a machine without a
GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.e2e.program import RECIPE
from tests.fork_server import ROOT

PARTS = (
    "parity",
    "sampling",
    "step",
    "step-one-draw",
    "step-whole-model",
    "plan",
    "memory-default",
    "memory-lean",
    "memory-leanest",
)


def run_script(**environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.nightly  # two minutes; the benchmarks' own tests run always
@pytest.mark.slow
def test_every_part_runs_at_toy_size(model: Path, tmp_path: Path) -> None:
    steps = 2
    result = run_script(
        DEVICE="cpu", OUT=str(tmp_path), HF=str(model), RECIPE=str(RECIPE), STEPS=str(steps)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert "FAILED" not in summary and all(
        f"\n## {part}\n" in summary for part in (*PARTS, "learning run")
    )
    for part in PARTS:
        written = json.loads((tmp_path / f"{part}.json").read_text())
        assert (
            written["figures"]
            and written["date"]
            and written["machine"]["torch"] == torch.__version__
        )
    step = json.loads((tmp_path / "step.json").read_text())["figures"]
    assert step["ratio"]["median"] > 1  # it also does all that the dense side does
    assert step["peak_memory_gib"].keys() == {"masked", "dense"}
    results = json.loads((tmp_path / "learn-results.json").read_text())["perplexity"]
    assert {"dense", "sparsegpt", "learned"} <= results.keys()
    records = [
        json.loads(line) for line in (tmp_path / "learn-metrics.jsonl").read_text().splitlines()
    ]
    assert sum(record["kind"] == "train" for record in records) == steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    result = run_script(DEVICE="cuda", OUT=str(tmp_path / "out"))
    assert result.returncode == 3 and "CUDA" in result.stderr and "DEVICE=cpu" in result.stderr
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - begin < 60  # one import of torch, on a machine that may be busy
