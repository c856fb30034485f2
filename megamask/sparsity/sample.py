"""The sampling operator: (mask logits, frozen weight, draw) -> masked weight, differentiable in the logits."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch

from megamask.errors import ConfigError
from megamask.sparsity import categorical
from megamask.sparsity.draw import Draw, Site


def choose_backend(name: str, device: torch.device) -> ModuleType:
    """The module with forward, backward and survey: ``torch`` (any device), ``numba`` (CPU), or ``auto``.

    Raises:
        ConfigError: the backend cannot run on this device or is not installed.
    """
    has_numba = importlib.util.find_spec("numba") is not None
    if name == "auto":
        name = "numba" if device.type == "cpu" and has_numba else "torch"
    if name == "torch":
        return categorical
    if name != "numba" or device.type != "cpu" or not has_numba:
        allowed = "auto, torch, or numba on a CPU with numba installed"
        raise ConfigError("learn.sampling.backend", name, f"{allowed} (this device is {device})", "Use auto.")
    from megamask.sparsity import fused_cpu

    return fused_cpu


def backend_name(backend: ModuleType) -> str:
    """What to call a backend in a log."""
    return "torch" if backend is categorical else "numba"


class SampleMask(torch.autograd.Function):
    """Masked weight of one draw. Saves nothing but its inputs: the backward pass draws the same noise again."""

    @staticmethod
    def forward(
        ctx: Any, mask_logits: torch.Tensor, weight: torch.Tensor, site: Site, draw: Draw, backend: ModuleType
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (W * M, (O, I) in the weight's dtype; sum |W * M|^2, 0-d, not differentiable)."""
        ctx.save_for_backward(mask_logits, weight)
        ctx.site, ctx.draw, ctx.backend = site, draw, backend
        masked, norm = backend.forward(mask_logits, weight, site, draw)
        ctx.mark_non_differentiable(norm)
        return masked, norm

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient at the logits alone: the weight is frozen."""
        mask_logits, weight = ctx.saved_tensors
        return ctx.backend.backward(grads[0], mask_logits, weight, ctx.site, ctx.draw), None, None, None, None
