"""A GPTModel whose vocabulary may be padded, and its language-model loss."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel

from megamask.model.vocabulary import CrossEntropy, Objective, VocabularyShard, fused_loss


class LanguageModel(GPTModel):  # type: ignore[misc]
    """GPTModel with a fused loss that knows which of this rank's vocabulary rows are real; the others never take part in a softmax."""

    shard: VocabularyShard

    def losses(self, hidden_SBH: torch.Tensor, objective: Objective) -> torch.Tensor:
        """The objective's loss of every token, (B, S) fp32, from the last layer's output; with sequence parallel, this rank's part of S.

        The objective's tokens are S x B, in that order.
        """
        if self.config.sequence_parallel:  # backward: sums the ranks' gradients, each keeps its part
            hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH)
        else:
            hidden_SBH = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        losses = fused_loss(hidden_SBH.flatten(0, 1), weight, self.shard, objective)
        return losses.view(hidden_SBH.shape[:2]).t().contiguous()

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero the rows that only pad the vocabulary: uninitialised memory may hold NaN, and 0 * NaN is NaN in a backward pass."""
        for layer in (self.embedding.word_embeddings, self.output_layer):
            if layer.weight is not None:
                layer.weight[self.shard.real :] = 0

    def _postprocess(self, *, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, **rest: Any) -> torch.Tensor:
        """Megatron's seam after the last layer (called by keyword from 0.14 on): with labels, the fused loss; without, its own logits."""
        if labels is None or not self.post_process:
            output: torch.Tensor = super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
            return output
        return self.losses(hidden_states, CrossEntropy(labels.t().flatten(), self.shard))


def token_losses(model: Any, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every target, (B, S) fp32 nats, equal on all TP ranks. ``model`` may be wrapped for DDP."""
    losses: torch.Tensor = model(input_ids=tokens_BS, position_ids=positions(tokens_BS), attention_mask=None, labels=labels_BS)
    return losses


def full_logits(model: LanguageModel, tokens_BS: torch.Tensor, vocab: int) -> torch.Tensor:
    """All logits on every rank, (B, S, V): for comparisons, not for learning."""
    local = model(input_ids=tokens_BS, position_ids=positions(tokens_BS), attention_mask=None)
    whole: torch.Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(local)
    return whole[..., :vocab]


def positions(tokens_BS: torch.Tensor) -> torch.Tensor:
    """0 .. S - 1 in every row, (B, S)."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
