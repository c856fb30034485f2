"""The setting ``deterministic``: only algorithms of PyTorch that give the same bits each time.

On a CPU the program uses no others, and the setting changes no bit. On CUDA the setting also asks
cuBLAS for fixed workspaces and keeps attention to plain matrix products: the backward passes of the
fused attention kernels add in an order that changes. No run has shown on CUDA that bits stay the
same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megamask.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_memory: Any = torch.utils.deterministic  # its module names no attributes for type checkers
FIXED = (":4096:8", ":16:8")  # the values with which cuBLAS promises the same bits


@contextmanager
def deterministic(is_asked: bool, device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms inside the block, where they are asked for.

    PyTorch raises at an operation that has none.

    Args:
        is_asked: the setting; False changes nothing.
        device: of this process, before its first call on CUDA.

    Raises:
        ConfigError: CUDA runs already, and cuBLAS was not told.
    """
    if not is_asked:
        yield
        return
    if device.type == "cuda":
        _fix_workspaces()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        _memory.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    # No memory is read before it is written. On a CPU the attention of before stays: its backends
    # give the same bits each time, and other backends give other bits.
    fused = (False, False, False) if device.type == "cuda" else before[3:]
    _switch(True, False, False, *fused)
    try:
        yield
    finally:
        _switch(*before)


def _switch(
    algorithms: bool, fill: bool, benchmark: bool, flash: bool, efficient: bool, cudnn: bool
) -> None:
    torch.use_deterministic_algorithms(algorithms)
    _memory.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _fix_workspaces() -> None:
    """Tell cuBLAS, which reads the variable when CUDA starts; Transformer Engine has one too."""
    found = os.environ.get(WORKSPACE)
    if found not in FIXED and torch.cuda.is_initialized():
        allowed = f"needs {WORKSPACE}={FIXED[0]} before CUDA starts, which it has"
        raise ConfigError("deterministic", True, allowed, "Set the variable before Python starts.")
    if found is not None and found not in FIXED:
        raise ConfigError(
            WORKSPACE, found, f"{' or '.join(FIXED)} where deterministic=true", "Unset it."
        )
    os.environ.setdefault(WORKSPACE, FIXED[0])
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
