"""Sums over the targets of windows through the Megatron path, and the perplexity made of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megamask.data.windows import NO_TARGET, Windows
from megamask.model.language_model import LanguageModel
from megamask.parallel.mesh import Mesh

Score = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
"""``score(tokens_BS, labels_BS)`` returns numbers of every token, (B, S) each."""


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
    windows = Windows.inside(windows_NS)
    total = summed_loss(model, mesh, windows, micro_batch, after_batch)
    return exp_of_mean(total, windows.targets)


def summed_loss(
    model: LanguageModel,
    mesh: Mesh,
    windows: Windows,
    micro_batch: int,
    after_batch: Callable[[], None] | None = None,
) -> float:
    """The cross entropy of all targets together, in nats; NaN if the model's outputs are not
    finite. The arguments are those of ``target_sums``.
    """

    def losses(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> tuple[torch.Tensor]:
        return (model.token_losses(tokens_BS, labels_BS),)

    (total,) = target_sums(mesh, windows, micro_batch, losses, after_batch=after_batch)
    return total


@torch.no_grad()
def target_sums(
    mesh: Mesh,
    windows: Windows,
    micro_batch: int,
    score: Score,
    numbers: int = 1,
    after_batch: Callable[[], None] | None = None,
) -> list[float]:
    """The sum of each number of ``score`` over all targets, in fp64, equal on all ranks.

    Args:
        mesh: process groups and device of this rank.
        windows: the windows, equal on all ranks; they are dealt to the replicas in turn.
        micro_batch: number of windows that run together.
        score: the numbers of a batch.
        numbers: how many they are.
        after_batch: called after each batch of this replica.
    """
    total = torch.zeros(numbers, dtype=torch.float64, device=mesh.device)
    for batch in replica_batches(mesh, windows, micro_batch):
        tokens_BS, labels_BS = batch.tokens_NS.to(mesh.device), batch.labels_NS.to(mesh.device)
        counts_BS = labels_BS != NO_TARGET
        found = score(tokens_BS, labels_BS)
        total += torch.stack([one[counts_BS].sum(dtype=torch.float64) for one in found])
        if after_batch is not None:
            after_batch()
    if mesh.dp > 1:
        torch.distributed.all_reduce(total, group=mesh.dp_group)
    return [float(one) for one in total]


def replica_batches(mesh: Mesh, windows: Windows, micro_batch: int) -> list[Windows]:
    """The batches of this replica, in order."""
    starts = range(0, len(windows), micro_batch)
    return [windows[start : start + micro_batch] for start in starts[mesh.dp_rank :: mesh.dp]]


def exp_of_mean(total: float, count: int) -> float:
    """The perplexity of losses with this sum: inf where it is beyond fp64, NaN stays NaN."""
    mean = total / count if count else math.nan
    return math.inf if mean >= 700 else math.exp(mean)
