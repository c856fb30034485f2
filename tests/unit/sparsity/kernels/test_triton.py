"""The Triton kernels: in Triton's interpreter anywhere, compiled where there is CUDA.

The interpreter must be switched on before triton is first imported, which other tests may have
done: the checks run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it is in the extra dev)",
)


INTERPRETED = pytest.param("1", id="interpreted")
COMPILED = pytest.param(
    "0", id="compiled", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process with the package in reach."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=HERE.parents[3],
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [INTERPRETED, COMPILED])
@pytest.mark.parametrize("checks", ["triton_checks.py", "triton_subset_checks.py"])
def test_the_kernels(checks: str, interpret: str) -> None:
    child = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / checks),
        TRITON_INTERPRET=interpret,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


def test_the_kernels_compile_for_hopper_without_spilling(tmp_path: Path) -> None:
    child = run(
        str(HERE / "triton_compile.py"), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)
    )
    assert child.returncode == 0, child.stdout + child.stderr[-4000:]
