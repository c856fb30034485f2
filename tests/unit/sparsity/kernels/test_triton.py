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


needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="triton is interpreted"
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
@needs_compiler
def test_no_kernel_has_grown_by_a_tenth(
    which: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.unit.sparsity.kernels import triton_compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert triton_compile.main([*which]) == 0, capsys.readouterr().out


@needs_compiler
def test_helpers_that_look_alike_are_seen() -> None:
    """The helper as it was, and as it is: told the length of its first tuple."""
    import triton.language as tl

    from megamask.sparsity.subset.triton_polynomials import coefficient
    from tests.unit.sparsity.kernels.triton_compile import LookAlikes

    one, two = ((tl.tensor(None, tl.float32),) * count for count in (1, 2))
    for told in (False, True):
        watch = LookAlikes()
        for a, b in ((one, two), (two, one), (one, two)):
            length = {"LENGTH": tl.constexpr(len(a))} if told else {}
            watch.see(coefficient, {"a": a, "b": b, "degree": tl.constexpr(0), **length})
        assert bool(watch.found) != told, watch.found


KNOWN = {"registers": 40.0, "spilled": 0.0, "instructions": 300.0}


@needs_compiler
@pytest.mark.parametrize(
    ("m", "registers", "spilled", "instructions", "known", "is_fine"),
    [
        (4, 44, 0, 330, KNOWN, True),
        (4, 45, 0, 300, KNOWN, False),
        (4, 40, 0, 331, KNOWN, False),
        (4, 40, 8, 300, KNOWN, False),
        (4, 40, 8, 300, None, False),
        (8, 40, 8, 300, None, True),
        (8, 40, 24, 300, None, False),
        (4, 128, 0, 999, None, True),
        (4, 129, 0, 300, None, False),
    ],
)
def test_growth_and_spilling_are_seen(
    m: int,
    registers: float,
    spilled: float,
    instructions: float,
    known: dict[str, float] | None,
    is_fine: bool,
) -> None:
    from tests.unit.sparsity.kernels.triton_compile import grown

    found = {"registers": registers, "spilled": spilled, "instructions": instructions}
    assert (grown(m, found, known, 128) == []) == is_fine
