"""A masked model beside the dense model, at every target: the divergence and the top token.

The dense model runs once. Its hidden states after the last norm stay in the CPU's memory, and its
logits are made again from them beside those of each masked model, a chunk of tokens at a time. So
the memory is tokens x hidden x bytes of the dtype on a rank (a part of it with sequence parallel),
and a masked model costs one more product with the vocabulary matrix. All rows of a table have the
same vocabulary matrix: masks and one-shot updates leave it alone.

Shapes: N windows, S sequence, B batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megamask.data.windows import Windows
from megamask.model.distillation import Distillation
from megamask.model.language_model import LanguageModel
from megamask.model.perplexity import target_sums
from megamask.model.top_token import WithTopToken
from megamask.model.vocabulary import CrossEntropy
from megamask.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sums:
    """Sums over targets.

    Attributes:
        targets: how many they are.
        loss: cross entropy in nats.
        kl: KL(dense || masked) in nats.
        agreements: targets at which both models have the same most likely token.
    """

    targets: int
    loss: float
    kl: float
    agreements: float


@dataclass(frozen=True)
class DenseOutputs:
    """What the dense model made of the windows that are compared.

    Attributes:
        windows: the windows.
        sums: the sums of the dense model itself.
        batches: hidden states (S, B, H) and top tokens (B, S) of each batch of this replica, in
            order.
    """

    windows: Windows
    sums: Sums
    batches: list[tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


def run_dense(model: LanguageModel, mesh: Mesh, windows: Windows, micro_batch: int) -> DenseOutputs:
    """Run the dense model.

    Args:
        model: the dense model.
        mesh: process groups and device of this rank.
        windows: the windows, equal on all ranks.
        micro_batch: number of windows that run together.
    """
    batches = []

    def score(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> tuple[torch.Tensor]:
        hidden_SBH = model.hidden_states(tokens_BS)
        objective = CrossEntropy(labels_BS.t().flatten(), model.shard)
        losses_BS, top_BS = model.losses(hidden_SBH, WithTopToken(objective, model.shard))
        batches.append((hidden_SBH.cpu(), top_BS.cpu()))
        return (losses_BS,)

    (loss,) = target_sums(mesh, windows, micro_batch, score)
    targets = windows.targets
    return DenseOutputs(windows, Sums(targets, loss, 0.0, targets), batches)


def run_masked(model: LanguageModel, mesh: Mesh, dense: DenseOutputs, micro_batch: int) -> Sums:
    """Run a masked model beside what the dense model made.

    Args:
        model: the masked model.
        mesh: as ``run_dense`` had it.
        dense: what ``run_dense`` returned.
        micro_batch: as ``run_dense`` had it.
    """
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(dense.batches)

    def score(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dense_SBH, dense_top_BS = (one.to(mesh.device) for one in next(batches))
        objective = Distillation(
            labels_T=labels_BS.t().flatten(),
            teacher_TH=model.whole(dense_SBH).flatten(0, 1),
            weight_VH=model.head_VH[: model.shard.real],
            shard=model.shard,
            logit_cap=model.logit_cap,
        )
        hidden_SBH = model.hidden_states(tokens_BS)
        _, lm_BS, kl_BS, top_BS = model.losses(hidden_SBH, WithTopToken(objective, model.shard))
        return lm_BS, kl_BS, top_BS == dense_top_BS

    sums = target_sums(mesh, dense.windows, micro_batch, score, numbers=3)
    return Sums(dense.windows.targets, *sums)
