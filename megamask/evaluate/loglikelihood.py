"""Log-likelihoods of continuations after contexts, as lm-evaluation-harness asks for them.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.data.windows import NO_TARGET
from megamask.errors import ConfigError
from megamask.evaluate.rows import not_finite_outputs
from megamask.model.language_model import LanguageModel
from megamask.model.top_token import WithTopToken
from megamask.model.vocabulary import CrossEntropy
from megamask.parallel.mesh import Mesh

Pair = tuple[list[int], list[int]]
Score = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``score(tokens_BS, labels_BS)`` returns the losses in nats and the most likely tokens, (B, S)."""


def megatron_score(model: LanguageModel) -> Score:
    """The scores of a Megatron model, equal on all ranks that share it."""

    def score(
        tokens_BS: torch.Tensor, labels_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plain = CrossEntropy(labels_BS.t().flatten(), model.shard)
        objective = WithTopToken(plain, model.shard)
        losses_BS, top_BS = model.losses(model.hidden_states(tokens_BS), objective)
        return losses_BS, top_BS

    return score


def transformers_score(model: Any) -> Score:
    """The scores of a causal language model of transformers."""

    def score(
        tokens_BS: torch.Tensor, labels_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BSV = model(tokens_BS, use_cache=False).logits.float()
        losses_BS = torch.nn.functional.cross_entropy(
            logits_BSV.transpose(1, 2), labels_BS, ignore_index=NO_TARGET, reduction="none"
        )
        return losses_BS, logits_BSV.argmax(-1)

    return score


@dataclass(frozen=True)
class Scorer:
    """Scores pairs of context and continuation in batches of similar length.

    Attributes:
        row: the row of the table that the scores are for; messages name it.
        weights: where its weights come from; messages name the path.
        score: the scores of a batch.
        device: where batches go.
        longest: the most tokens that the model reads; a multiple of ``multiple``.
        micro_batch: pairs of one forward pass.
        multiple: lengths of batches are filled up to a multiple of it (sequence parallel).
        mesh: the replicas among which batches are dealt; None for one process.
    """

    row: str
    weights: Path
    score: Score
    device: torch.device
    longest: int
    micro_batch: int
    multiple: int = 1
    mesh: Mesh | None = None

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each pair: the log-likelihood of the continuation in nats, and whether each of its
        tokens is the most likely; equal on all ranks, in the order of the pairs.

        A context that is too long loses its first tokens.

        Raises:
            ConfigError: a continuation alone is longer than the model reads; on all ranks, before
                any pair is scored.
            ArtifactError: a log-likelihood is not finite; on all ranks.
        """
        self._check(pairs)
        order = sorted(range(len(pairs)), key=lambda at: -sum(map(len, pairs[at])))
        dp, dp_rank = (self.mesh.dp, self.mesh.dp_rank) if self.mesh else (1, 0)
        starts = range(0, len(order), self.micro_batch)
        found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.device)
        for start in starts[dp_rank::dp]:
            batch = order[start : start + self.micro_batch]
            found[batch] = self._batch([pairs[at] for at in batch])
        if self.mesh is not None and dp > 1:
            torch.distributed.all_reduce(found, group=self.mesh.dp_group)
        if not found.isfinite().all():
            raise not_finite_outputs(self.weights, "the tasks", self.row)
        return [(float(likelihood), bool(greedy)) for likelihood, greedy in found.tolist()]

    def _batch(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Log-likelihood and greedy flag of each pair, (B, 2) fp64."""
        kept = [self._cut(*pair) for pair in pairs]
        length = max(max(len(ids) for ids, _ in kept) - 1, 1)
        length = -(-length // self.multiple) * self.multiple
        tokens_BS = torch.zeros(len(kept), length, dtype=torch.int64)
        labels_BS = torch.full_like(tokens_BS, NO_TARGET)
        for row, (ids, targets) in enumerate(kept):
            end = len(ids) - 1
            tokens_BS[row, :end] = torch.tensor(ids[:-1], dtype=torch.int64)
            labels_BS[row, end - targets : end] = torch.tensor(ids[end + 1 - targets :])
        tokens_BS, labels_BS = tokens_BS.to(self.device), labels_BS.to(self.device)
        losses_BS, top_BS = self.score(tokens_BS, labels_BS)
        counts_BS = labels_BS != NO_TARGET
        likelihood_B = -losses_BS.where(counts_BS, 0).sum(1, dtype=torch.float64)
        greedy_B = ((top_BS == labels_BS) | ~counts_BS).all(1)
        return torch.stack([likelihood_B, greedy_B.double()], 1)

    def _check(self, pairs: Sequence[Pair]) -> None:
        """Check all pairs, and not only those of this replica: if one replica alone raised, the
        others would wait for it.
        """
        most = max((len(continuation) for _, continuation in pairs), default=0)
        if most > self.longest:
            raise ConfigError(
                "tasks.names",
                f"a continuation of {most:,} tokens",
                f"continuations of at most {self.longest:,} tokens, the positions of the model",
                "Choose tasks with shorter answers.",
            )

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """The last ids that the model reads, with the last target, and the number of targets."""
        return (context + continuation)[-(self.longest + 1) :], len(continuation)
