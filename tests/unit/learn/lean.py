"""Linears and gradients for tests of optimizers, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megamask.config.tree import OptimizerSection
from megamask.sparsity.draw import Placement, Site
from megamask.sparsity.pattern import Pattern

SEED = 5
BETAS = (0.9, 0.99)


def section(kind: str = "lion", **changed: Any) -> OptimizerSection:
    return OptimizerSection(kind=kind, **{"betas": BETAS, "lr": 3e-4, "weight_decay": 0.1, **changed})


def linear(logits: torch.Tensor, parameter_id: int = 7, placement: Placement | None = None) -> Any:
    """What an optimizer sees of a masked linear: its logits (O, C, G), copied, and where they lie."""
    place = placement or Placement.whole(logits.shape[0], logits.shape[2])
    return SimpleNamespace(mask_logits=torch.nn.Parameter(logits.clone()), parameter_id=parameter_id, site=Site(Pattern(2, 4), place))


def random_logits(rows: int = 24, groups: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (0.02 * torch.randn(rows, 6, groups, generator=torch.Generator().manual_seed(seed))).to(dtype)


def random_grad(step: int, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.01 * torch.randn(like.shape, generator=torch.Generator().manual_seed(1000 + step))).to(dtype)


def take_step(optimizer: Any, step: int, grads: Sequence[torch.Tensor], rate: float = 3e-4, clip: float = 1.0) -> None:
    for logits, grad in zip(optimizer.logits, grads, strict=True):
        logits.main_grad = grad.clone()
    optimizer.step(step, rate, torch.tensor(clip))
