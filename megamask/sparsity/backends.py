"""Who does the sampling: plain PyTorch anywhere, fused numba kernels on a CPU, fused Triton kernels
on CUDA.
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
        device: the device type it runs on; None: any.
        modules: the module of every distribution that it can sample.
        host: makes the sampler from such a module.
    """

    package: str
    device: str | None
    modules: dict[str, str]
    host: Callable[[ModuleType], Sampler]


BACKENDS = {
    "torch": Backend(
        "torch",
        None,
        {"categorical": "categorical.gumbel_softmax", "linear": "subset.k_subset"},
        _as_sampler,
    ),
    "numba": Backend(
        "numba",
        "cpu",
        {"categorical": "categorical.gumbel_softmax_numba", "linear": "subset.k_subset_numba"},
        NumbaSampler,
    ),
    "triton": Backend(
        "triton",
        "cuda",
        {"categorical": "categorical.gumbel_softmax_triton", "linear": "subset.k_subset_triton"},
        TritonSampler,
    ),
}


def choose_backend(name: str, device: torch.device, distribution: str = "categorical") -> str:
    """The name of the backend to use: the one asked for, or with ``auto`` the fused one of the
    device, else plain PyTorch.

    Raises:
        ConfigError: the backend cannot run on this device, cannot draw from this distribution or is
            not installed.
    """
    if name == "auto":
        fused = next(
            (other for other, backend in BACKENDS.items() if backend.device == device.type), "torch"
        )
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
def sampler_for(name: str, distribution: str = "categorical") -> Sampler:
    """The sampling of a distribution by the backend with this name (of ``choose_backend``)."""
    backend = BACKENDS[name]
    module = importlib.import_module(f"megamask.sparsity.{backend.modules[distribution]}")
    return backend.host(module)


def _lack(name: str, device: torch.device, distribution: str) -> str | None:
    """Why a backend cannot be used; None when it can."""
    backend = BACKENDS[name]
    if backend.device not in (None, device.type):
        return f"this device is {device.type}"
    if not _is_installed(backend.package):
        return f"{backend.package} is not installed"
    return (
        None
        if distribution in backend.modules
        else f"{name} cannot draw learn.distribution={distribution}"
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
