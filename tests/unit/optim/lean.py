"""Linears and gradients for tests of optimizers, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Site
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

SEED = 5
BETAS = (0.9, 0.99)


def section(kind: str = "lion", **changed: Any) -> OptimizerSection:
    return OptimizerSection(
        kind=kind, **{"betas": BETAS, "lr": 3e-4, "weight_decay": 0.1, **changed}
    )


def linear(logits: torch.Tensor, parameter_id: int = 7, placement: Placement | None = None) -> Any:
    """What an optimizer sees of a masked linear: its logits (O, C, G), copied, and where they
    lie.
    """
    place = placement or Placement.whole(logits.shape[0], logits.shape[2])
    site, weight = Site(Pattern(2, 4), place, CATEGORICAL), torch.empty(0)
    return SimpleNamespace(
        mask_logits=torch.nn.Parameter(logits.clone()),
        parameter_id=parameter_id,
        site=site,
        weight=weight,
    )


def random_logits(
    rows: int = 24, groups: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    return (0.02 * torch.randn(rows, 6, groups, generator=torch.Generator().manual_seed(seed))).to(
        dtype
    )


def random_grad(step: int, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (
        0.01 * torch.randn(like.shape, generator=torch.Generator().manual_seed(1000 + step))
    ).to(dtype)


def take_step(
    optimizer: Any, step: int, grads: Sequence[torch.Tensor], rate: float = 3e-4, clip: float = 1.0
) -> None:
    for logits, grad in zip(optimizer.logits, grads, strict=True):
        logits.main_grad = grad.clone()
    optimizer.step(step, rate, torch.tensor(clip))


def same_bits(one: Any, other: Any) -> bool:
    """Whether two optimizers have the same logits and state."""
    pairs = zip(
        [*one.logits, *one.state_tensors()], [*other.logits, *other.state_tensors()], strict=True
    )
    return all(torch.equal(a, b) for a, b in pairs)


def neighbours(value: torch.Tensor, relative: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 (as fp32) below and above an fp64 in size; ``relative`` widens it by the error of
    the fp32 arithmetic.
    """
    down, up = (value * (1 - relative)).float(), (value * (1 + relative)).float()
    low, high = (down.view(torch.int32) & -0x10000), (up.view(torch.int32) + 0xFFFF) & -0x10000
    return low.view(torch.float32), high.view(torch.float32)
