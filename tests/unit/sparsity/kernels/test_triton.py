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
def test_the_kernels(interpret: str) -> None:
    child = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "triton_checks.py"),
        str(HERE / "triton_subset_checks.py"),
        str(HERE.parents[1] / "learn" / "maskpro" / "score_triton_checks.py"),
        TRITON_INTERPRET=interpret,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "which",
    [
        pytest.param((), id="2:4 on sm_90"),
        pytest.param(("--all",), id="all", marks=pytest.mark.nightly),
    ],
)
def test_no_kernel_has_grown_by_a_tenth(which: tuple[str, ...], tmp_path: Path) -> None:
    module = "tests.unit.sparsity.kernels.triton_compile"
    child = run("-m", module, *which, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert child.returncode == 0, child.stdout + child.stderr[-4000:]


def test_helpers_that_look_alike_are_seen() -> None:
    """The helper as it was, and as it is: told the length of its first tuple."""
    program = (
        "from tests.unit.sparsity.kernels.triton_compile import LookAlikes\n"
        "from megamask.sparsity.subset.triton_polynomials import coefficient\n"
        "import triton.language as tl\n"
        "one, two = ((tl.tensor(None, tl.float32),) * count for count in (1, 2))\n"
        "for told in (False, True):\n"
        "    watch = LookAlikes()\n"
        "    for a, b in ((one, two), (two, one), (one, two)):\n"
        "        length = {'LENGTH': tl.constexpr(len(a))} if told else {}\n"
        "        watch.see(coefficient, {'a': a, 'b': b, 'degree': tl.constexpr(0), **length})\n"
        "    assert bool(watch.found) != told, watch.found\n"
    )
    child = run("-c", program, TRITON_INTERPRET="0")
    assert child.returncode == 0, child.stderr


def test_growth_and_spilling_are_seen() -> None:
    """The comparison itself, in a process in which triton is not yet interpreted."""
    program = (
        "from tests.unit.sparsity.kernels.triton_compile import grown as of\n"
        "def grown(m, found, known): return of(m, found, known, 128)\n"
        "known = {'registers': 40, 'spilled': 0, 'instructions': 300}\n"
        "assert grown(4, {'registers': 44, 'spilled': 0, 'instructions': 330}, known) == []\n"
        "assert grown(4, {'registers': 45, 'spilled': 0, 'instructions': 300}, known)\n"
        "assert grown(4, {'registers': 40, 'spilled': 0, 'instructions': 331}, known)\n"
        "assert grown(4, {'registers': 40, 'spilled': 8, 'instructions': 300}, known)\n"
        "assert grown(4, {'registers': 40, 'spilled': 8, 'instructions': 300}, None)\n"
        "assert grown(8, {'registers': 40, 'spilled': 8, 'instructions': 300}, None) == []\n"
        "assert grown(8, {'registers': 40, 'spilled': 24, 'instructions': 300}, None)\n"
        "assert grown(4, {'registers': 128, 'spilled': 0, 'instructions': 999}, None) == []\n"
        "assert grown(4, {'registers': 129, 'spilled': 0, 'instructions': 300}, None)\n"
    )
    child = run("-c", program, TRITON_INTERPRET="0")
    assert child.returncode == 0, child.stderr
