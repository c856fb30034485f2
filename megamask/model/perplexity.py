"""Perplexity over held-out windows through the Megatron path."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megamask.model.language_model import LanguageModel
from megamask.parallel.mesh import Mesh


@torch.no_grad()
def perplexity(
    model: LanguageModel,
    mesh: Mesh,
    windows_NS: torch.Tensor,
    micro_batch: int,
    after_batch: Callable[[], None] | None = None,
) -> float:
    """exp of the mean cross entropy over the S - 1 targets of every window.

    The windows are dealt to the data-parallel replicas in turn. The sums are fp64, so the result
    does not depend on the number of replicas, up to rounding.

    A perplexity is NaN if the model's outputs are not finite.

    Args:
        model: the model.
        mesh: process groups and device of this rank.
        windows_NS: N windows of S tokens, equal on all ranks.
        micro_batch: number of windows that run together.
        after_batch: called after each batch of this replica.
    """
    batches = list(torch.split(windows_NS, micro_batch))
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in batches[mesh.dp_rank :: mesh.dp]:
        batch = batch.to(mesh.device)
        losses = model.token_losses(batch, batch.roll(-1, dims=1))[:, :-1]
        total += torch.stack(
            [
                losses.sum(dtype=torch.float64),
                torch.tensor(losses.numel(), dtype=torch.float64, device=mesh.device),
            ]
        )
        if after_batch is not None:
            after_batch()
    if mesh.dp > 1:
        torch.distributed.all_reduce(total, group=mesh.dp_group)
    mean = float(total[0] / total[1])
    return math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN
