"""A language model of Megatron that gives hidden states, and the losses that are made of them
without ever holding all logits.

Shapes: S tokens of a sequence, B sequences, H hidden, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule

from megamask.model.vocabulary import (
    Capped,
    CrossEntropy,
    Objective,
    VocabularyShard,
    cap_,
    fused_loss,
)


@dataclass(frozen=True)
class TokenLosses:
    """The losses of every target, (B, S) fp32 in nats, equal on all TP ranks.

    Attributes:
        objective: the loss to minimise, differentiable.
        lm: cross entropy.
        kd: the divergence from the dense model times the squared temperature; None without a
            teacher.
        hidden: the distance of the layers from those of the dense model, the mean over all targets,
            0-d fp64; None where it takes no part. It is no part of ``objective``: its gradient is
            added behind the layers (:mod:`megamask.model.hidden_match`).
    """

    objective: torch.Tensor
    lm: torch.Tensor
    kd: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def parts(self) -> dict[str, torch.Tensor]:
        """The means over all targets of what the losses consist of, 0-d fp64, by metric."""
        named = {"lm_loss": self.lm, "kd_loss": self.kd, "hidden_loss": self.hidden}
        return {name: part.mean().double() for name, part in named.items() if part is not None}


class LanguageModel(LanguageModule):
    """A model whose forward pass ends with the hidden states after the last norm. Its layers and
    parameters are those of a class of Megatron (``megamask.model.model_class``).

    Losses are made of the hidden states by :meth:`losses`, which knows the real rows of this rank's
    vocabulary: rows that only pad it never take part in a softmax. The model runs without the
    wrapper of Megatron's DDP, whose own forward pass only calls it.

    Attributes:
        shard: this rank's part of the vocabulary.
        logit_cap: logits become cap * tanh(logit / cap); None leaves them.
    """

    shard: VocabularyShard
    logit_cap: float | None = None

    def hidden_states(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm, (S, B, H); with sequence parallel, this rank's part of
        S.
        """
        hidden_SBH: torch.Tensor = self(
            input_ids=tokens_BS, position_ids=positions(tokens_BS), attention_mask=None
        )
        return hidden_SBH

    def token_losses(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Cross entropy of every target, (B, S) fp32 in nats, equal on all TP ranks."""
        objective = CrossEntropy(labels_BS.t().flatten(), self.shard)
        return self.losses(self.hidden_states(tokens_BS), objective)[0]

    def losses(self, hidden_SBH: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, ...]:
        """The objective's loss of every token and the other quantities that it measures, (B, S)
        fp32 each.

        Args:
            hidden_SBH: as ``hidden_states`` returns them.
            objective: a loss of S x B tokens, in that order.
        """
        hidden_SBH = self.whole(hidden_SBH)
        if self.logit_cap is not None:
            objective = Capped(objective, self.logit_cap)
        found = fused_loss(hidden_SBH.flatten(0, 1), self.head_VH, self.shard, objective)
        return tuple(one.view(hidden_SBH.shape[:2]).t().contiguous() for one in found)

    def full_logits(self, tokens_BS: torch.Tensor, vocab: int) -> torch.Tensor:
        """All logits on every rank, (B, S, ``vocab``): for comparisons, too large for learning."""
        local_SBV, _ = self.output_layer(self.hidden_states(tokens_BS), weight=self.head_VH)
        whole: torch.Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(local_SBV)
        if self.logit_cap is not None:
            whole = cap_(whole.clone(), self.logit_cap)
        return whole.transpose(0, 1)[..., :vocab].contiguous()

    def rotary_angles(self, length: int) -> torch.Tensor | None:
        """The rotary angles of ``length`` positions, as the layers take them; None for a model with
        a learned table of positions.
        """
        if self.position_embedding_type != "rope":
            return None
        angles: torch.Tensor = self.rotary_pos_emb(length)
        return angles

    def whole(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Hidden states of all of S, as the head of this rank needs them; the backward pass sums
        the gradients of the ranks.
        """
        if self.config.sequence_parallel:
            whole_SBH: torch.Tensor = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_SBH
            )  # backward: each rank keeps its part
            return whole_SBH
        same_SBH: torch.Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH)
        return same_SBH

    @property
    def head_VH(self) -> torch.Tensor:
        """This rank's rows of the vocabulary matrix, with the rows that only pad it."""
        tied = self.share_embeddings_and_output_weights
        weight: torch.Tensor = (
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        )
        return weight

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero the rows that only pad the vocabulary: uninitialised memory may hold NaN, and 0 *
        NaN is NaN in a backward pass.
        """
        for layer in (self.embedding.word_embeddings, self.output_layer):
            if layer.weight is not None:
                layer.weight[self.shard.real :] = 0


def text_losses(
    model: LanguageModel, tokens_BS: torch.Tensor, labels_BS: torch.Tensor
) -> TokenLosses:
    """The cross entropy of every target, and nothing else."""
    losses_BS = model.token_losses(tokens_BS, labels_BS)
    return TokenLosses(losses_BS, losses_BS.detach())


def positions(tokens_BS: torch.Tensor) -> torch.Tensor:
    """0 .. S - 1 in every row, (B, S)."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
