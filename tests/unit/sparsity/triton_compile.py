"""Compile every Triton kernel for Hopper (sm_90); no GPU is needed. Prints one line a kernel: registers, spilled bytes, layout changes.

python tests/unit/sparsity/triton_compile.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megamask.sparsity import fused_cuda, kernels_triton, kernels_triton_many
from megamask.sparsity.pattern import Pattern

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {"masked": "*i64", "weight": "*i64", "grad": "*i64", "winner": "*u8", "sums": "*fp32", "codes": "*i64"}
CASES = [(kernels_triton, Pattern(2, 4)), (kernels_triton, Pattern(1, 4)), (kernels_triton_many, Pattern(4, 8))]


def source(kernels: ModuleType, name: str, pattern: Pattern, logits: str, flag: bool) -> ASTSource:
    """A kernel with bf16 weights, as fused_cuda launches it in a big layer."""
    kernel = getattr(kernels, name)
    cut = fused_cuda.Cut.of(1 << 20, 1024)
    constants: dict[str, Any] = {
        **fused_cuda._candidates(pattern, torch.device("cpu")), **cut.constants, "BITS": 16, "GRAD_BITS": 16,
        **dict.fromkeys(("HARD", "WATCH", "ADD"), flag),
    }  # fmt: skip
    pointers = {**POINTERS, "logits": f"*{logits}", "dlogits": f"*{logits}"}
    signature, aligned = {}, {}
    for position, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = pointers.get(parameter.name) or parameter.annotation_type or "fp32"
        if parameter.name in pointers:
            aligned[(position,)] = [["tt.divisibility", 16]]
    used = {key: value for key, value in constants.items() if signature.get(key) == "constexpr"}
    return ASTSource(kernel, signature, used, aligned)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> int:
    """1 when a kernel spills, or needs so many registers that few programs fit."""
    passed = True
    for kernels, pattern in CASES:
        for name in ("forward", "backward", "survey"):
            for logits, flag in (("fp32", False), ("bf16", True)):
                options = {"num_warps": fused_cuda.WARPS, "enable_fp_fusion": True}
                compiled = triton.compile(source(kernels, name, pattern, logits, flag), target=TARGET, options=options)
                registers, spilled = resources(compiled.asm["cubin"])
                moved = compiled.asm["ttgir"].count("convert_layout")
                print(f"{name} {pattern} {logits} flags={flag}: {registers} registers, {spilled} bytes spilled, {moved} layout changes")
                # 32 registers a thread is what leaves a Hopper multiprocessor full, 64 half full.
                passed &= spilled == 0 and registers <= (32 if kernels is kernels_triton else 64)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
