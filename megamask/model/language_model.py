"""A GPTModel whose vocabulary may be padded, with a loss that never holds all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel

from megamask.model.vocabulary import CrossEntropy, Objective, VocabularyShard, fused_loss


class LanguageModel(GPTModel):  # type: ignore[misc]
    """GPTModel with a fused loss that knows which of this rank's vocabulary rows are real; the
    others never take part in a softmax.
    """

    shard: VocabularyShard

    def losses(self, hidden_SBH: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, ...]:
        """The objective's loss of every token, and what else it measured, (B, S) fp32 each.

        From the last layer's output; with sequence parallel, this rank's part of S. The objective's
        tokens are S x B, in that order.
        """
        hidden_SBH = self.whole(hidden_SBH)
        found = fused_loss(hidden_SBH.flatten(0, 1), self.head_VH, self.shard, objective)
        return tuple(one.view(hidden_SBH.shape[:2]).t().contiguous() for one in found)

    def whole(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """Hidden states of all of S, as the head of this rank sees them; backward, the ranks'
        gradients are summed.
        """
        if self.config.sequence_parallel:
            whole_SBH: torch.Tensor = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_SBH
            )  # backward: each keeps its part
            return whole_SBH
        same_SBH: torch.Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH)
        return same_SBH

    @property
    def head_VH(self) -> torch.Tensor:
        """This rank's rows of the vocabulary matrix, with those that pad."""
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

    def _postprocess(self, *, hidden_states: torch.Tensor, labels: Any = None, **rest: Any) -> Any:
        """Megatron's seam after the last layer (called by keyword from 0.14 on): without labels,
        its own logits.

        Labels (B, S) give the fused loss. Labels that are a ``Reading`` give whatever that makes of
        the hidden states.
        """
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        if isinstance(labels, torch.Tensor):
            return self.losses(hidden_states, CrossEntropy(labels.t().flatten(), self.shard))[0]
        return labels(self, hidden_states)


Reading = Callable[
    [LanguageModel, torch.Tensor], Any
]  # of hidden states (S, B, H) after the last norm, within the model's forward pass


def _read(model: Any, tokens_BS: torch.Tensor, labels: torch.Tensor | Reading | None = None) -> Any:
    return model(
        input_ids=tokens_BS, position_ids=positions(tokens_BS), attention_mask=None, labels=labels
    )


def full_logits(model: LanguageModel, tokens_BS: torch.Tensor, vocab: int) -> torch.Tensor:
    """All logits on every rank, (B, S, V): for comparisons, not for learning."""
    local = _read(model, tokens_BS)
    whole: torch.Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(local)
    return whole[..., :vocab]


def positions(tokens_BS: torch.Tensor) -> torch.Tensor:
    """0 .. S - 1 in every row, (B, S)."""
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
