"""A GPTModel whose vocabulary may be padded, and its language-model loss."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region


class LanguageModel(GPTModel):  # type: ignore[misc]
    """GPTModel that knows how many of this rank's vocabulary rows are real; the others never take part in a softmax."""

    real_vocab: int  # of this rank's rows

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Vocabulary-parallel cross entropy, (B, S) fp32, of labels (B, S) and logits (S, B, V / tp)."""
        losses: torch.Tensor = super().compute_language_model_loss(labels, self._without_padding(logits))
        return losses

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero the rows that only pad the vocabulary: uninitialised memory may hold NaN, and 0 * NaN is NaN in a backward pass."""
        for layer in (self.embedding.word_embeddings, self.output_layer):
            if layer.weight is not None:
                layer.weight[self.real_vocab :] = 0

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        if self.real_vocab == logits.shape[-1]:
            return logits
        padding = torch.arange(logits.shape[-1], device=logits.device) >= self.real_vocab
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min)


def token_losses(model: Any, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every target, (B, S) fp32 nats, equal on all TP ranks. ``model`` may be wrapped for DDP."""
    losses: torch.Tensor = model(input_ids=tokens_BS, position_ids=positions(tokens_BS), attention_mask=None, labels=labels_BS)
    return losses


def full_logits(model: LanguageModel, tokens_BS: torch.Tensor, vocab: int) -> torch.Tensor:
    """All logits on every rank, (B, S, V): for comparisons, not for learning."""
    local = model(input_ids=tokens_BS, position_ids=positions(tokens_BS), attention_mask=None)
    whole: torch.Tensor = gather_from_tensor_model_parallel_region(local)
    return whole[..., :vocab]


def positions(tokens_BS: torch.Tensor) -> torch.Tensor:
    """0 .. S - 1 in every row, (B, S)."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
