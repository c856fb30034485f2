"""The losses that a masked model can learn from: of the text, of the dense model, or of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from megamask.config.learn_tree import DistillationSection
from megamask.model.distillation import Distillation
from megamask.model.language_model import LanguageModel, TokenLosses, text_losses
from megamask.parallel.mask_context import MaskSwitch

# (model, tokens (B, S), labels (B, S)) -> losses of every target
Loss = Callable[[LanguageModel, torch.Tensor, torch.Tensor], TokenLosses]


def loss_of(section: DistillationSection, switch: MaskSwitch) -> Loss:
    """The loss that ``learn.distillation`` asks for, of models whose masks ``switch`` controls."""
    if section.share == 0:
        return text_losses
    return partial(distilled_losses, section=section, switch=switch)


def distilled_losses(
    model: LanguageModel,
    tokens_BS: torch.Tensor,
    labels_BS: torch.Tensor,
    section: DistillationSection,
    switch: MaskSwitch,
    teacher_SBH: torch.Tensor | None = None,
) -> TokenLosses:
    """The divergence from the dense model at every target alone or mixed with the cross
    entropy.

    Args:
        model: the student, under the masks that ``switch`` has set.
        tokens_BS: input tokens.
        labels_BS: targets.
        section: ``learn.distillation``.
        switch: turns the masks off for the teacher.
        teacher_SBH: ``dense_hidden`` of the same tokens; None computes it.
    """
    dense_SBH = dense_hidden(model, tokens_BS, switch) if teacher_SBH is None else teacher_SBH
    hidden_SBH = model.hidden_states(tokens_BS)
    objective = Distillation(
        labels_T=labels_BS.t().flatten(),
        teacher_TH=model.whole(dense_SBH).flatten(0, 1),
        weight_VH=model.head_VH[: model.shard.real],
        shard=model.shard,
        temperature=section.temperature,
        top_k=section.top_k,
        share=section.share,
        logit_cap=model.logit_cap,
    )
    return TokenLosses(*model.losses(hidden_SBH, objective))


@torch.no_grad()
def dense_hidden(model: LanguageModel, tokens_BS: torch.Tensor, switch: MaskSwitch) -> torch.Tensor:
    """Hidden states of the model without masks, (S, B, H); with sequence parallel, this rank's part
    of S.
    """
    with switch.without_masks():
        return model.hidden_states(tokens_BS)
