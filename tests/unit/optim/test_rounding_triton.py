"""The CUDA kernels of the lean optimizers: in Triton's interpreter anywhere, compiled where there
is CUDA.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megamask.config import load_config
from megamask.sparsity.noise import NoiseKey
from tests.unit.sparsity.kernels.test_triton import COMPILED, INTERPRETED, needs_compiler, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it is in the extra dev)",
)


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [INTERPRETED, COMPILED])
def test_the_kernels(interpret: str) -> None:
    """In a process of its own, because triton is interpreted or not from its first import on."""
    checks = str(Path(__file__).parent / "rounding_triton_checks.py")
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", checks)
    child = run(*command, TRITON_INTERPRET=interpret)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


@needs_compiler
def test_the_compiled_update_rounds_as_ieee_says_and_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other numbers and sizes, the upper half of 32-bit ids, and a clip factor at an address that
    16 does not divide need no other code.
    """
    from benchmarks.gpu import learning_kernels
    from benchmarks.gpu.compile_kernels import compiling
    from benchmarks.gpu.learning_kernels import Shape, update

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = load_config(None, ["learn.memory=lean"])
    with compiling(90) as compiled:
        for number in range(2):
            monkeypatch.setattr(learning_kernels, "KEY", NoiseKey(*[2**31 * number + 1] * 4))
            for columns in (4096, 8192):
                update(config, Shape(4096 + number, columns))
        monkeypatch.setattr(torch, "ones", lambda shape: torch.zeros(8)[1])
        update(config, Shape(4097, 8192))
    (kernel,) = compiled
    code = kernel.asm["ptx"]
    assert "sqrt.rn.f32" in code and "div.rn.f32" in code
    assert "fma." not in code and ".ftz" not in code, "operations that round otherwise"
