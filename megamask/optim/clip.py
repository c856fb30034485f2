"""The gradient norm over all shards, and the factor that clips it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamask.optim.zero1 import Replicas
from megamask.parallel.mesh import Mesh


@torch.no_grad()
def gradient_norm(
    grads: Sequence[torch.Tensor], mesh: Mesh, replicas: Replicas | None = None
) -> torch.Tensor:
    """The norm over all shards, 0-d fp64. ``grads`` are all of this rank, or those that
    ``replicas`` leaves to it.
    """
    squares = (
        torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32)).double().square()
    )
    return mesh.sum_over_tp((replicas.from_all(squares) if replicas else squares).sum()).sqrt()


def clip_factor(norm: torch.Tensor, largest: float) -> torch.Tensor:
    """What the gradients are multiplied by so that their norm is at most ``largest`` (0: any), 0-d
    fp32.
    """
    return (
        (largest / norm.clamp(min=largest)).float()
        if largest > 0
        else torch.ones_like(norm, dtype=torch.float32)
    )
