"""A GPTModel whose vocabulary may be padded, and what is learned from its outputs: the text, the
dense model, or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megamask.config.tree import LossSection
from megamask.model.distillation import Distillation
from megamask.model.language_model import LanguageModel, _read
from megamask.parallel.mask_context import MaskSwitch


@dataclass(frozen=True)
class TokenLosses:
    """What a model makes of every target, (B, S) fp32 nats, equal on all TP ranks.

    Attributes:
        objective: what is minimised, differentiable.
        lm: cross entropy.
        kd: divergence from the dense model, with its temperature's square; None where it takes no
            part.
    """

    objective: torch.Tensor
    lm: torch.Tensor
    kd: torch.Tensor | None = None


def objective_losses(
    model: Any,
    tokens_BS: torch.Tensor,
    labels_BS: torch.Tensor,
    settings: LossSection,
    switch: MaskSwitch,
    teacher_SBH: torch.Tensor | None = None,
) -> TokenLosses:
    """The losses of every target under ``learn.loss``. ``model`` may be wrapped for DDP.

    Args:
        switch: of the model's masks, which are as they should be; a teacher runs without them.
        teacher_SBH: ``dense_hidden`` of the same tokens, where it is at hand; None makes it where
            it is needed.
    """
    if settings.kind == "lm":
        losses = token_losses(model, tokens_BS, labels_BS)
        return TokenLosses(losses, losses.detach())
    dense_SBH = dense_hidden(model, tokens_BS, switch) if teacher_SBH is None else teacher_SBH

    def compare(inner: LanguageModel, hidden_SBH: torch.Tensor) -> TokenLosses:
        teacher_TH, weight_VH = (
            inner.whole(dense_SBH).flatten(0, 1),
            inner.head_VH[: inner.shard.real],
        )
        share = settings.share if settings.kind == "mix" else 1.0
        labels_T = labels_BS.t().flatten()
        objective = Distillation(
            labels_T,
            teacher_TH,
            weight_VH,
            inner.shard,
            settings.temperature,
            settings.top_k,
            share,
        )
        return TokenLosses(*inner.losses(hidden_SBH, objective))

    found: TokenLosses = _read(model, tokens_BS, compare)
    return found


@torch.no_grad()
def dense_hidden(model: Any, tokens_BS: torch.Tensor, switch: MaskSwitch) -> torch.Tensor:
    """Hidden states of the model without masks, after the last norm: (S, B, H); with sequence
    parallel, this rank's part of S.
    """
    with switch.without_masks():
        hidden_SBH: torch.Tensor = _read(model, tokens_BS, lambda _, hidden_SBH: hidden_SBH)
    return hidden_SBH


def token_losses(model: Any, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every target, (B, S) fp32 nats, equal on all TP ranks. ``model`` may be
    wrapped for DDP.
    """
    losses: torch.Tensor = _read(model, tokens_BS, labels_BS)
    return losses
