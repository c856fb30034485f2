"""The fused kernels of the frozen model: in Triton's interpreter anywhere, compiled where there is
CUDA, and built for GPUs that are not here.

The interpreter must be switched on before triton is first imported, which other tests may have
done: the checks run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config.load import build_config
from megamask.model.fused import seams
from megamask.model.fused.seams import Fusions
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import read_architecture
from megamask.weights.family import Rope

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it is in the extra dev)",
)
INTERPRETED = pytest.param("1", id="interpreted")
COMPILED = pytest.param(
    "0", id="compiled", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
)


def run(*command: str, **environment: str) -> None:
    """A Python process with the package in reach; it must succeed."""
    child = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [INTERPRETED, COMPILED])
def test_fused_kernels(interpret: str) -> None:
    checks = str(HERE / "fused_checks.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", checks, TRITON_INTERPRET=interpret)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton is interpreted")
def test_fused_kernels_compile_for_an_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing spills (the rotation's 32 bytes are the sine's table for angles above 100,000), and
    memory is read and written 16 bytes at a time.
    """
    from benchmarks.gpu.compile_kernels import compiling, frozen_parts
    from tests.unit.sparsity.kernels.triton_compile import resources

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiling(90) as compiled:
        frozen_parts("llama2-7b")
    wide = {"rotate": (2, 2), "forward": (2, 1), "backward": (3, 2)}  # reads and writes
    assert [one.name for one in compiled] == ["rotate", "rotate", "forward", "backward"]
    for one in compiled:
        registers, local, _ = resources(one.asm["cubin"])
        assert registers <= 64 and local <= (32 if one.name == "rotate" else 0), one.name
        ptx = one.asm["ptx"]
        assert (ptx.count("ld.global.v4"), ptx.count("st.global.v4")) == wide[one.name]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Fusions(True, True)),
        ({"activation": "gelu_tanh"}, Fusions(False, True)),
        ({"activation": "silu", "gated": False}, Fusions(False, True)),
        ({"ropes": (Rope(theta=1e4, share=0.5),)}, Fusions(True, False)),
        ({"ropes": (Rope(theta=1e4), Rope(theta=1e6, share=0.5))}, Fusions(True, False)),
        ({"ropes": ()}, Fusions(True, False)),
    ],
)
def test_a_model_fuses_what_the_kernels_cover(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    expected: Fusions,
) -> None:
    """Where a trial finds nothing."""
    arch = replace(read_architecture(ROOT / "configs" / "models" / "tiny-llama.json"), **change)
    tried: list[Any] = []

    def problem(words: str) -> None:
        def try_out(*sizes: Any) -> str:
            tried.append(sizes[0])
            return words

        for name in ("activation_problem", "rotation_problem"):
            monkeypatch.setattr(seams, name, try_out)

    def fusions(
        device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **settings: Any
    ) -> Fusions:
        config = build_config({"parallel": settings})
        return Fusions.of(config, arch, Mesh(torch.device(device), 0, 2, 2, 0, 1, 0), dtype)

    problem("")
    assert fusions() == fusions(dtype=torch.float32) == expected
    sizes = [arch.ffn // 2] * expected.activation + [
        [arch.heads // 2, arch.kv_heads // 2]
    ] * expected.rotation
    assert tried == [*sizes, *sizes]
    assert not caplog.records
    problem("no compiler")
    neither = Fusions(False, False)
    assert fusions() == neither and len(caplog.records) == len(sizes)
    assert all("no compiler" in one.getMessage() for one in caplog.records)
    problem("")
    assert fusions(fused=False) == fusions("cpu") == fusions(dtype=torch.half) == neither
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fusions() == neither
