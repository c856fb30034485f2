"""Where the sampling runs: plain PyTorch anywhere, fused numba kernels on a CPU, fused Triton
kernels on CUDA.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import cast

import torch

from megamask.errors import ConfigError
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import Sampler
from megamask.sparsity.kernels.numba_host import NumbaSampler
from megamask.sparsity.kernels.triton_host import TritonSampler

log = logging.getLogger(__name__)


def _as_sampler(module: ModuleType) -> Sampler:
    return cast(Sampler, module)


@dataclass(frozen=True)
class Backend:
    """What a backend needs.

    Attributes:
        package: the Python package.
        device: the device type that it runs on; None: any.
        kernels: dotted path of a distribution's module for this backend; None: there is none.
        host: makes the sampler from this module.
    """

    package: str
    device: str | None
    kernels: Callable[[Distribution], str | None]
    host: Callable[[ModuleType], Sampler]


BACKENDS = {
    "torch": Backend("torch", None, lambda one: one.reference, _as_sampler),
    "numba": Backend("numba", "cpu", lambda one: one.numba, NumbaSampler),
    "triton": Backend("triton", "cuda", lambda one: one.triton, TritonSampler),
}


def choose_backend(name: str, device: torch.device, distribution: Distribution) -> str:
    """The name of the backend to use.

    Args:
        name: the backend asked for, or ``auto``: the fused backend of the device, else plain
            PyTorch with a warning.
        device: where logits and weights lie.
        distribution: of the masks.

    Raises:
        ConfigError: the backend cannot run on this device, has no kernels of this distribution or
            is not installed.
    """
    if name == "auto":
        fused = next((key for key, one in BACKENDS.items() if one.device == device.type), "torch")
        lack = _lack(fused, device, distribution)
        if lack:
            log.warning("sampling in plain PyTorch, several times slower: %s", lack)
        return "torch" if lack else fused
    lack = _lack(name, device, distribution)
    if lack:
        allowed = (
            f"auto, torch, numba on a CPU, triton on CUDA, each with its package installed ({lack})"
        )
        package = BACKENDS[name].package
        fix = "Use auto." if _is_installed(package) else f"Use auto, or pip install {package}."
        raise ConfigError("learn.sampling.backend", name, allowed, fix)
    return name


@lru_cache
def sampler_for(name: str, distribution: Distribution) -> Sampler:
    """The sampler of a distribution on the backend with this name (of ``choose_backend``)."""
    backend = BACKENDS[name]
    path = backend.kernels(distribution)
    assert path is not None  # choose_backend refuses such a backend
    return backend.host(importlib.import_module(path))


def _lack(name: str, device: torch.device, distribution: Distribution) -> str | None:
    """Why a backend cannot be used; None when it can."""
    backend = BACKENDS[name]
    if backend.device not in (None, device.type):
        return f"this device is {device.type}"
    if not _is_installed(backend.package):
        return f"{backend.package} is not installed"
    if backend.kernels(distribution) is None:
        return f"{name} has no kernels of the {distribution.name} distribution"
    return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
