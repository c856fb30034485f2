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

from benchmarks.gpu.lease_parts import PARTS, Situation
from tests.e2e.program import RECIPE
from tests.fork_server import ROOT


def run_script(**environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.mark.nightly  # four minutes; the benchmarks' own tests run always
@pytest.mark.slow
def test_every_part_runs_at_toy_size(model: Path, tmp_path: Path) -> None:
    steps = 2
    result = run_script(
        DEVICE="cpu",
        OUT=str(tmp_path / "out"),
        HF=str(model),
        RECIPE=str(RECIPE),
        STEPS=str(steps),
        BUDGET="1200",  # a part is left out when its expected time on a GPU no longer fits
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    here = Situation("cpu", tmp_path, model)
    for part in PARTS:
        found = record[part.name]
        if part.command(here) is None:
            assert found["state"].startswith("not run")
            continue
        assert found["state"] == "ok", part.name
        assert bool(found["result"]) == part.writes_figures
    step = record["step"]["result"]
    assert step["machine"]["torch"] == torch.__version__ and step["figures"]["ratio"]["median"] > 0
    learned = record["real-model"]["result"]
    assert {"dense", "sparsegpt", "learned"} <= learned["perplexity"].keys()
    assert len(learned["losses"]) == steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    result = run_script(DEVICE="cuda", OUT=str(tmp_path / "out"))
    assert result.returncode == 3 and "CUDA" in result.stderr and "DEVICE=cpu" in result.stderr
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - begin < 60  # one import of torch, on a machine that may be busy
