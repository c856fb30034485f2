"""Who does the sampling: plain PyTorch anywhere, fused numba kernels on a CPU, fused Triton kernels on CUDA."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import lru_cache
from types import ModuleType

import torch

from megamask.errors import ConfigError

log = logging.getLogger(__name__)

# name: (module, package it needs, device it runs on)
BACKENDS: dict[str, tuple[str, str, str | None]] = {
    "torch": ("megamask.sparsity.categorical", "torch", None),
    "numba": ("megamask.sparsity.fused_cpu", "numba", "cpu"),
    "triton": ("megamask.sparsity.fused_cuda", "triton", "cuda"),
}


def choose_backend(name: str, device: torch.device) -> str:
    """The name of the backend to use: the one asked for, or with ``auto`` the fused one of the device, else plain PyTorch.

    Raises:
        ConfigError: the backend cannot run on this device or is not installed.
    """
    if name == "auto":
        fused = next((other for other, (_, _, runs_on) in BACKENDS.items() if runs_on == device.type), "torch")
        if _is_installed(fused):
            return fused
        log.warning("sampling in plain PyTorch, several times slower: %s is not installed", BACKENDS[fused][1])
        return "torch"
    _, package, runs_on = BACKENDS[name]
    if runs_on not in (None, device.type) or not _is_installed(name):
        allowed = f"auto, torch, numba on a CPU, triton on CUDA, each with its package installed (this device is {device.type})"
        problem = "Use auto." if _is_installed(name) else f"Use auto, or pip install {package}."
        raise ConfigError("learn.sampling.backend", name, allowed, problem)
    return name


@lru_cache
def backend_by_name(name: str) -> ModuleType:
    """The module with ``forward``, ``backward`` and ``survey``."""
    return importlib.import_module(BACKENDS[name][0])


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(BACKENDS[name][1]) is not None
