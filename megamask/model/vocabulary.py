"""Hidden states to losses through a frozen vocabulary matrix, some tokens at a time: nothing of
size tokens x vocabulary is kept.

The head is frozen, so all that the backward pass needs is the gradient at the hidden states. It is
made at once with the loss, while
the logits are at hand: the same matmuls as a separate forward and backward, without logits, softmax
or weight gradient in between.

Shapes: T tokens, V this rank's rows of the vocabulary, H hidden, P ranks that share the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# (logits_TV, which tokens they belong to, whether to overwrite them with d loss / d logits) ->
# loss_T fp32, and what else was measured
Objective = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, ...]]

CHUNK_BYTES = 256 << 20  # of fp32 logits of one chunk
CPU_CHUNK = 512  # tokens; a CPU's matmuls gain nothing from more, and lose from less
CPU_BLOCK_BYTES = (
    16 << 20
)  # of fp32 logits: what stays in a CPU's cache from one pass over them to the next


@dataclass(frozen=True)
class VocabularyShard:
    """One rank's part of the vocabulary. Row 0 belongs to token ``first``; from row ``real`` on,
    rows only pad.
    """

    first: int
    real: int  # differs between ranks, and may be 0
    rows: int  # with padding: the same on all ranks
    group: dist.ProcessGroup | None = None  # of the ranks that hold the whole


@dataclass(frozen=True)
class CrossEntropy:
    """The objective of next-token prediction, in nats."""

    labels_T: torch.Tensor
    shard: VocabularyShard

    def __call__(
        self, logits_TV: torch.Tensor, tokens: slice, gradient: bool
    ) -> tuple[torch.Tensor]:
        """Losses of these tokens, (T,) fp32; with ``gradient``, d loss / d logits in place of the
        logits.
        """
        labels_T = self.labels_T[tokens]
        blocks = pieces(len(labels_T), block_size(self.shard, logits_TV.device))
        space = torch.empty_like(logits_TV[blocks[0]], dtype=torch.float32)
        return (
            torch.cat(
                [
                    cross_entropy_(logits_TV[block], labels_T[block], self.shard, gradient, space)
                    for block in blocks
                ]
            ),
        )


def fused_loss(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, shard: VocabularyShard, objective: Objective
) -> tuple[torch.Tensor, ...]:
    """The objective's loss of every token, (T,) fp32, differentiable by the hidden states, and what
    else it measured of each, which is not.

    Args:
        hidden_TH: in the compute dtype. Its gradient is this rank's share: to be summed over the
            ranks that hold other rows.
        weight_VH: this rank's rows, frozen; those that pad are not read.
        shard: which rows these are.
        objective: turns the logits of real rows into losses, and into their gradient at the logits.
    """
    assert not weight_VH.requires_grad, "the head is frozen: its gradient is never made"
    chunks = pieces(len(hidden_TH), chunk_size(shard, hidden_TH.device))
    gradient = torch.is_grad_enabled() and hidden_TH.requires_grad
    found: tuple[torch.Tensor, ...] = _FusedLoss.apply(
        hidden_TH, weight_VH[: shard.real], objective, chunks, gradient
    )
    return found


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        objective: Objective,
        chunks: list[slice],
        gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        logits = hidden_TH.new_empty(
            chunks[0].stop, len(weight_VH)
        )  # one buffer: fresh pages cost a CPU as much as the matmul
        found = []
        grad_TH = torch.empty_like(hidden_TH) if gradient else None
        for tokens in chunks:
            logits_TV = torch.mm(
                hidden_TH[tokens], weight_VH.t(), out=logits[: tokens.stop - tokens.start]
            )
            found.append(objective(logits_TV, tokens, gradient))
            if grad_TH is not None:
                torch.mm(logits_TV, weight_VH, out=grad_TH[tokens])
        losses, *measured = map(torch.cat, zip(*found, strict=True))
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
    """Tokens of one matmul: whole tiles of 128 where there is room. Ranks must agree, as they meet
    in every block.
    """
    tokens = max(CHUNK_BYTES // (4 * shard.rows), 1)
    tokens = tokens // 128 * 128 or tokens
    return min(tokens, CPU_CHUNK) if device.type == "cpu" else tokens


def block_size(shard: VocabularyShard, device: torch.device, buffers: int = 1) -> int:
    """Tokens whose losses are computed together in so many fp32 buffers: all of a chunk over their
    number, on a CPU fewer.
    """
    if device.type == "cpu":
        return max(CPU_BLOCK_BYTES // (4 * shard.rows * buffers), 1)
    return max(chunk_size(shard, device) // buffers, 1)


def pieces(total: int, size: int) -> list[slice]:
    """Slices of ``size`` that cover ``total``, the last of what is left; one empty slice for
    nothing.
    """
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


def cross_entropy_(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    shard: VocabularyShard,
    gradient: bool,
    space: torch.Tensor,
) -> torch.Tensor:
    """Cross entropy over the vocabulary of all ranks, (T,) fp32, the same bits on each; needs one
    collective.

    With ``gradient``, the logits are overwritten with softmax - one-hot, computed in fp32.
    ``space`` is at least as large, fp32.
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
    """From every rank's largest logit, sum of exponentials and logit of the label (zero if it has
    none): the losses, and the factors
    that turn this rank's exponentials into probabilities."""
    if shard.group is None or shard.group.size() == 1:
        return sum_T.log() - (label_T - top_T), 1 / sum_T
    tops_PT, sums_PT, labels_PT = from_ranks([top_T, sum_T, label_T], shard).unbind(1)
    whole_T = tops_PT.amax(0)
    total_T = (sums_PT * (tops_PT - whole_T).exp()).sum(0)
    return total_T.log() - (labels_PT.sum(0) - whole_T), (top_T - whole_T).exp() / total_T


def from_ranks(mine: Sequence[torch.Tensor], shard: VocabularyShard) -> torch.Tensor:
    """N numbers a token (T,) from every rank that holds part of the vocabulary, (P, N, T), the same
    on each; one collective.
    """
    stacked, size = torch.stack(list(mine)), shard.group.size() if shard.group else 1
    if shard.group is None or size == 1:
        return stacked[None]
    every = stacked.new_empty(size * len(stacked), *stacked.shape[1:])
    dist.all_gather_into_tensor(every, stacked, group=shard.group)
    return every.view(size, *stacked.shape)
