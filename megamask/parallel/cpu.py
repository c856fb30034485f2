"""The changes that make Megatron-Core run without CUDA.

Megatron-Core asks CUDA for the current device, passes ``device="cuda"`` to factory functions,
synchronises streams, and forks, saves and restores CUDA's random state around dropout and
recomputation. While ``megatron_on_cpu`` is active, all these calls go to the CPU or do nothing.
A frozen model uses no random state of CUDA, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import random
from torch.overrides import TorchFunctionMode


class _FactoriesOnCpu(TorchFunctionMode):
    """Change a ``cuda`` device argument of any torch call to ``cpu``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


@contextmanager
def megatron_on_cpu(active: bool) -> Iterator[None]:
    """Send CUDA requests to the CPU inside the block; do nothing unless ``active``."""
    if not active:
        yield
        return
    current_device = patch.object(torch.cuda, "current_device", lambda: torch.device("cpu"))
    synchronize = patch.object(torch.cuda, "synchronize", lambda device=None: None)
    fork = patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: nullcontext())
    state = patch.multiple(
        random, _get_cuda_rng_state=lambda **_: None, _set_cuda_rng_state=lambda *_, **__: None
    )
    with current_device, synchronize, fork, state, _FactoriesOnCpu():
        yield


def emulates_bf16() -> bool:
    """Whether this CPU is known to have no bf16 instructions for matmuls.

    oneDNN then emulates bf16 matmuls at about a fifth of the fp32 speed. The answer is False where
    PyTorch is too old to tell (``torch.cpu.get_capabilities`` is missing).
    """
    read = getattr(torch.cpu, "get_capabilities", dict)
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86 and ARM
    present = [there for name, there in read().items() if name in names]
    return bool(present) and not any(present)
