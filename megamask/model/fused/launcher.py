"""The launch of the fused kernels of the frozen model, and where they can run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import torch

KINDS = (torch.bfloat16, torch.float32)


def is_interpreted() -> bool:
    """Whether Triton runs the kernels on CPU tensors, slowly, for tests: TRITON_INTERPRET=1, set
    before triton is first imported.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_kernels(device: torch.device) -> bool:
    """Whether the fused kernels run on this device: on CUDA, where Triton is installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def takes(tensor: torch.Tensor) -> bool:
    """Whether the kernels take this tensor."""
    return tensor.dtype in KINDS and (tensor.is_cuda or is_interpreted())


def options(warps: int) -> dict[str, Any]:
    """Triton's. The compiler may not make one rounding of a product and a sum, because PyTorch
    rounds between its passes.
    """
    return {"num_warps": warps, "enable_fp_fusion": False}


def launch(
    kernel: Any,
    programs: int,
    warps: int,
    on: torch.Tensor,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Start ``programs`` programs of a kernel on the device of ``on``."""
    if programs == 0:
        return
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, **options(warps))
