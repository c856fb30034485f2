"""Compile every Triton kernel for Hopper (sm_90); no GPU is needed. Prints one line a kernel:
registers, spilled bytes, layout changes.

python -m tests.unit.sparsity.kernels.triton_compile   (with --all also 8:16: takes minutes)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Site
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset.subset import SUBSET

CPU = torch.device("cpu")
TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {"masked": "*i64", "weight": "*i64", "grad": "*i64", "sums": "*fp32", "codes": "*i64"}
HARD_CODES = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}
WHOLE = Placement.whole(1, 1)
# The most registers and bytes of local memory a thread: 32 registers leave a Hopper multiprocessor
# full, 64 half full, 128 a quarter.
CASES = {
    Site(Pattern(2, 4), WHOLE, CATEGORICAL): (32, 0),
    Site(Pattern(1, 4), WHOLE, CATEGORICAL): (32, 0),
    Site(Pattern(4, 8), WHOLE, CATEGORICAL): (64, 0),
    Site(Pattern(2, 4), WHOLE, SUBSET): (48, 0),
    Site(Pattern(4, 8), WHOLE, SUBSET): (128, 16),
}
SLOW = {Site(Pattern(8, 16), WHOLE, SUBSET): (255, 2048)}


def source(site: Site, name: str, logits: str, flag: bool) -> ASTSource:
    """A kernel with bf16 weights, as fused_cuda launches it in a big layer."""
    assert site.distribution.triton is not None
    kernels = import_module(site.distribution.triton).kernels_of(site.pattern, CPU)
    kernel = getattr(kernels, name)
    cut = triton_host.Cut.of(1 << 20, 1024)
    constants: dict[str, Any] = {
        **kernels.constants,
        **cut.constants,
        "BITS": 16,
        "GRAD_BITS": 16,
        **dict.fromkeys(("HARD", "STATISTICS", "ADD"), flag),
    }
    pointers = {
        **POINTERS,
        "hard_codes": HARD_CODES[site.code_dtype],
        "logits": f"*{logits}",
        "dlogits": f"*{logits}",
    }
    signature, aligned = {}, {}
    for position, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = (
                pointers.get(parameter.name) or parameter.annotation_type or "fp32"
            )
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
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def main() -> int:
    """1 when a kernel spills, or needs so many registers that few programs fit."""
    passed = True
    for site, (most, local) in {**CASES, **(SLOW if "--all" in sys.argv else {})}.items():
        for name in ("forward", "backward", "mask_statistics"):
            for logits, flag in (("fp32", False), ("bf16", True)):
                options = {"num_warps": triton_host.WARPS, "enable_fp_fusion": True}
                compiled = triton.compile(
                    source(site, name, logits, flag), target=TARGET, options=options
                )
                registers, spilled = resources(compiled.asm["cubin"])
                moved = compiled.asm["ttgir"].count("convert_layout")
                what = f"{name} {site.distribution} {site.pattern} {logits} flags={flag}"
                found = f"{registers} registers, {spilled} bytes spilled, {moved} layout changes"
                print(f"{what}: {found}", flush=True)
                passed &= spilled <= local and registers <= most
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
