"""Kernels compiled without a GPU, through the product's call sites."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
PROGRAM = "benchmarks.gpu.compile_kernels"


@pytest.mark.nightly  # test_triton.py compiles the kernels always
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_compiled_kernels_are_found_again_in_another_folder(tmp_path: Path) -> None:
    """The second call compiles nothing new in a copied cache, so a cache that travels is used."""

    def compile_into(folder: Path) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            **{"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
        }
        command = [sys.executable, "-m", PROGRAM, "--masks", "subset/2:4", "--models"]
        return subprocess.run(
            command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=300
        )

    first = compile_into(tmp_path / "one")
    assert first.returncode == 0, first.stderr[-3000:]
    cubins = list((tmp_path / "one").rglob("*.cubin"))
    assert cubins and len(cubins) == int(
        first.stdout.splitlines()[-1].split()[0]
    )  # "N kernels for sm_90 in S s"
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "one").rglob("*"):
        if path.suffix in (".cubin", ".json"):
            target = tmp_path / "other" / path.relative_to(tmp_path / "one")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").rglob("*.cubin")}
    second = compile_into(tmp_path / "other")
    assert second.returncode == 0, second.stderr[-3000:]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "other").rglob("*.cubin")}
    assert after == before
