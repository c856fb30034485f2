"""Losses from hidden states through a frozen vocabulary matrix, a chunk of tokens at a time.

No tensor of the size tokens x vocabulary is kept. The head is frozen, so the backward pass needs
only the gradient at the hidden states. This gradient is computed together with the loss, while the
logits of the chunk exist. The matmuls are the same as in a separate forward and backward pass, but
logits, softmax and weight gradient are not stored.

Shapes: T tokens, V rows of the vocabulary on this rank, H hidden, P ranks that share the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Objective = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, ...]]
"""``objective(logits_TV, tokens, gradient)`` returns losses (T,) fp32 and other measured numbers.

``tokens`` says which tokens the logits belong to. With ``gradient``, d loss / d logits overwrites
the logits.
"""

CHUNK_BYTES = 256 << 20  # size of the fp32 logits of a chunk
CPU_CHUNK = 512  # tokens; the matmuls of a CPU gain nothing from a larger chunk
CPU_BLOCK_BYTES = 16 << 20  # size of fp32 logits that stay in a CPU's cache between two passes


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary on this rank.

    Attributes:
        first: token id of row 0.
        real: number of rows that belong to tokens; differs between ranks and may be 0.
        rows: number of rows with padding; the same on all ranks.
        group: the ranks that together hold the whole vocabulary; None for a single rank.
    """

    first: int
    real: int
    rows: int
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class CrossEntropy:
    """The objective of next-token prediction, in nats."""

    labels_T: torch.Tensor
    shard: VocabularyShard

    def __call__(
        self, logits_TV: torch.Tensor, tokens: slice, gradient: bool
    ) -> tuple[torch.Tensor]:
        """The losses of a chunk of tokens, (T,) fp32.

        With ``gradient``, d loss / d logits overwrites the logits.
        """
        labels_T = self.labels_T[tokens]
        blocks = pieces(len(labels_T), block_size(self.shard, logits_TV.device))
        space = torch.empty_like(logits_TV[blocks[0]], dtype=torch.float32)
        losses = [
            cross_entropy_(logits_TV[block], labels_T[block], self.shard, gradient, space)
            for block in blocks
        ]
        return (torch.cat(losses),)


@dataclass(frozen=True)
class Capped:
    """An objective of capped logits, cap * tanh(logit / cap), as one of the logits themselves."""

    objective: Objective
    cap: float

    def __call__(
        self, logits_TV: torch.Tensor, tokens: slice, gradient: bool
    ) -> tuple[torch.Tensor, ...]:
        """As the objective. With ``gradient``, d loss / d logits overwrites the logits."""
        cap_(logits_TV, self.cap)
        slope_TV = 1 - (logits_TV / self.cap).square_() if gradient else None
        found = self.objective(logits_TV, tokens, gradient)
        if slope_TV is not None:
            logits_TV.mul_(slope_TV)
        return found


def cap_(logits_TV: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logit / cap), in place of the logits."""
    return logits_TV.div_(cap).tanh_().mul_(cap)


def fused_loss(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, shard: VocabularyShard, objective: Objective
) -> tuple[torch.Tensor, ...]:
    """The loss of every token, and other numbers of the objective.

    Args:
        hidden_TH: hidden states in the compute dtype. Their gradient is the share of this rank; the
            caller sums it over the ranks that hold other rows.
        weight_VH: the frozen rows on this rank; rows that pad the vocabulary are not read.
        shard: the place of these rows in the vocabulary.
        objective: computes losses, and their gradient, from the logits of real rows.

    Returns:
        The losses (T,) fp32, which are differentiable with respect to the hidden states, and the
        other numbers (T,), which are not.
    """
    assert not weight_VH.requires_grad, "the head is frozen: its gradient is never made"
    chunks = pieces(len(hidden_TH), chunk_size(shard, hidden_TH.device))
    gradient = torch.is_grad_enabled() and hidden_TH.requires_grad
    apply: Any = _FusedLoss.apply
    results: tuple[torch.Tensor, ...] = apply(
        hidden_TH, weight_VH[: shard.real], objective, chunks, gradient
    )
    return results


class _FusedLoss(torch.autograd.Function):
    """The losses of all chunks; forward also computes the gradient at the hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        objective: Objective,
        chunks: list[slice],
        gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        # All chunks share a buffer, because new memory pages cost a CPU as much as the matmul.
        logits = hidden_TH.new_empty(chunks[0].stop, len(weight_VH))
        results = []
        grad_TH = torch.empty_like(hidden_TH) if gradient else None
        for tokens in chunks:
            logits_TV = torch.mm(
                hidden_TH[tokens], weight_VH.t(), out=logits[: tokens.stop - tokens.start]
            )
            results.append(objective(logits_TV, tokens, gradient))
            if grad_TH is not None:
                torch.mm(logits_TV, weight_VH, out=grad_TH[tokens])
        losses, *measured = map(torch.cat, zip(*results, strict=True))
        ctx.save_for_backward(grad_TH)
        ctx.mark_non_differentiable(*measured)
        return losses, *measured

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, upstream_T: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, None, None, None, None]:
        (grad_TH,) = ctx.saved_tensors
        return (grad_TH * upstream_T[:, None]).to(grad_TH.dtype), None, None, None, None


def chunk_size(shard: VocabularyShard, device: torch.device) -> int:
    """Number of tokens of a matmul: a multiple of 128 where there is room.

    The number is the same on all ranks, because every block has a collective.
    """
    tokens = max(CHUNK_BYTES // (4 * shard.rows), 1)
    tokens = tokens // 128 * 128 or tokens
    return min(tokens, CPU_CHUNK) if device.type == "cpu" else tokens


def block_size(shard: VocabularyShard, device: torch.device, buffers: int = 1) -> int:
    """Number of tokens whose losses are computed together.

    ``buffers`` fp32 buffers are in use at the same time. On a GPU they share the size of a chunk,
    on a CPU they fit the cache.
    """
    if device.type == "cpu":
        return max(CPU_BLOCK_BYTES // (4 * shard.rows * buffers), 1)
    return max(chunk_size(shard, device) // buffers, 1)


def pieces(total: int, size: int) -> list[slice]:
    """Slices of length ``size`` that cover ``total``; the last may be shorter.

    A total of 0 gives an empty slice.
    """
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


def cross_entropy_(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    shard: VocabularyShard,
    gradient: bool,
    space: torch.Tensor,
) -> torch.Tensor:
    """Cross entropy over the vocabulary of all ranks, (T,) fp32, with one collective.

    All ranks get the same bits.

    Args:
        logits_TV: logits of the real rows. With ``gradient``, softmax - one-hot, computed in fp32,
            overwrites them.
        labels_T: token ids of the whole vocabulary.
        shard: the part of the vocabulary on this rank.
        gradient: whether to compute the gradient.
        space: fp32 buffer that is at least as large as the logits.
    """
    if not logits_TV.shape[1]:
        none = logits_TV.new_zeros(len(labels_T), dtype=torch.float32)
        return _over_ranks(none - torch.inf, none, none, shard)[0]
    place_T = labels_T - shard.first
    here_T = (place_T >= 0) & (place_T < logits_TV.shape[1])
    at_label = torch.arange(len(labels_T), device=labels_T.device), place_T.where(here_T, 0)
    exp_TV = space[: len(labels_T)].copy_(logits_TV)
    top_T = exp_TV.amax(1)
    label_T = exp_TV[at_label].where(here_T, 0)
    exp_TV.sub_(top_T[:, None]).exp_()
    losses, scale_T = _over_ranks(top_T, exp_TV.sum(1), label_T, shard)
    if gradient:
        exp_TV.mul_(scale_T[:, None])
        exp_TV[at_label] -= here_T.float()
        logits_TV.copy_(exp_TV)
    return losses


def _over_ranks(
    top_T: torch.Tensor, sum_T: torch.Tensor, label_T: torch.Tensor, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, and the factors from this rank's exponentials to probabilities, (T,) each.

    Args:
        top_T: largest logit on this rank.
        sum_T: sum of exp(logit - top_T) on this rank.
        label_T: logit of the label; 0 where another rank holds it.
        shard: the part of the vocabulary on this rank.
    """
    if shard.group is None or shard.group.size() == 1:
        return sum_T.log() - (label_T - top_T), 1 / sum_T
    tops_PT, sums_PT, labels_PT = from_ranks([top_T, sum_T, label_T], shard).unbind(1)
    whole_T = tops_PT.amax(0)
    total_T = (sums_PT * (tops_PT - whole_T).exp()).sum(0)
    return total_T.log() - (labels_PT.sum(0) - whole_T), (top_T - whole_T).exp() / total_T


def from_ranks(own: Sequence[torch.Tensor], shard: VocabularyShard) -> torch.Tensor:
    """Gather N numbers a token from all ranks that share the vocabulary, with one collective.

    Args:
        own: N tensors (T,) of this rank.
        shard: the part of the vocabulary on this rank.

    Returns:
        The numbers of all ranks (P, N, T), the same on each rank.
    """
    stacked, size = torch.stack(list(own)), shard.group.size() if shard.group else 1
    if shard.group is None or size == 1:
        return stacked[None]
    every = stacked.new_empty(size * len(stacked), *stacked.shape[1:])
    dist.all_gather_into_tensor(every, stacked, group=shard.group)
    return every.view(size, *stacked.shape)
