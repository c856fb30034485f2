"""The losses that a masked model can learn from: of the text, of the dense model, or of both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist

from megamask.config.learn_tree import DistillationSection
from megamask.model.distillation import Distillation
from megamask.model.hidden_match import HiddenMatch
from megamask.model.language_model import LanguageModel, TokenLosses, text_losses
from megamask.model.vocabulary import CrossEntropy
from megamask.parallel.mask_context import MaskSwitch

# (model, tokens (B, S), labels (B, S)) -> losses of every target
Loss = Callable[[LanguageModel, torch.Tensor, torch.Tensor], TokenLosses]


def loss_of(
    section: DistillationSection, switch: MaskSwitch, match: HiddenMatch | None = None
) -> Loss:
    """The loss that ``learn.distillation`` asks for, of models whose masks ``switch`` controls.

    Args:
        section: ``learn.distillation``.
        switch: turns the masks off for the teacher.
        match: compares the layers of the model; None where ``section.hidden`` is 0.
    """
    if section.share == 0 and match is None:
        return text_losses
    return partial(distilled_losses, section=section, switch=switch, match=match)


def distilled_losses(
    model: LanguageModel,
    tokens_BS: torch.Tensor,
    labels_BS: torch.Tensor,
    section: DistillationSection,
    switch: MaskSwitch,
    match: HiddenMatch | None = None,
) -> TokenLosses:
    """The divergence from the dense model at every target alone or mixed with the cross entropy,
    and on top the distance of the layers from those of the dense model.

    Args:
        model: the student, under the masks that ``switch`` has set.
        tokens_BS: input tokens.
        labels_BS: targets.
        section: ``learn.distillation``.
        switch: turns the masks off for the teacher.
        match: adds the gradient of the distance of the layers in the backward pass.
    """
    with match.recording() if match else nullcontext():
        dense_SBH = dense_hidden(model, tokens_BS, switch)
    with match.matching() if match else nullcontext():
        hidden_SBH = model.hidden_states(tokens_BS)
    labels_T = labels_BS.t().flatten()
    hidden = None if match is None else _mean_over_tokens(match.measured(), model, tokens_BS)
    if section.share == 0:
        (lm_BS,) = model.losses(hidden_SBH, CrossEntropy(labels_T, model.shard))
        return TokenLosses(lm_BS, lm_BS.detach(), hidden=hidden)
    objective = Distillation(
        labels_T=labels_T,
        teacher_TH=model.whole(dense_SBH).flatten(0, 1),
        weight_VH=model.head_VH[: model.shard.real],
        shard=model.shard,
        temperature=section.temperature,
        top_k=section.top_k,
        share=section.share,
        logit_cap=model.logit_cap,
    )
    objective_BS, lm_BS, kd_BS = model.losses(hidden_SBH, objective)
    return TokenLosses(objective_BS, lm_BS, kd_BS, hidden)


def _mean_over_tokens(
    total: torch.Tensor, model: LanguageModel, tokens_BS: torch.Tensor
) -> torch.Tensor:
    """A sum over the tokens of this rank, 0-d, as the mean over all tokens of the micro-batch."""
    if model.config.sequence_parallel:
        dist.all_reduce(total, group=model.shard.group)
    return total / tokens_BS.numel()


@torch.no_grad()
def dense_hidden(model: LanguageModel, tokens_BS: torch.Tensor, switch: MaskSwitch) -> torch.Tensor:
    """Hidden states of the model without masks, (S, B, H); with sequence parallel, this rank's part
    of S.
    """
    with switch.without_masks():
        return model.hidden_states(tokens_BS)
