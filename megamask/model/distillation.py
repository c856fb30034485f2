"""Distillation from the dense model, together with next-token prediction.

The teacher is the dense model, the student is the model with masks. Both share the frozen
vocabulary matrix, so the teacher's logits are computed from its hidden states, a chunk of tokens at
a time.

kd = temperature^2 * KL(teacher || student) in nats per token, with both distributions at the same
temperature. The factor keeps the gradient of kd as large as that of next-token prediction, whatever
the temperature (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015).

With top_k, the divergence is taken over k + 1 events: each of the k tokens that the teacher finds
most likely, and all other tokens together. Renormalising over the k tokens instead would lose the
probability of the others. This kd tells the student how much probability the others have, though
not how it is divided, and it is never above the kd of the whole vocabulary. Tokens that tie with
the first token behind the k count as others, whatever rank they lie on.

Shapes: T tokens, V real rows of the vocabulary on this rank, H hidden, P ranks that share the
vocabulary, K = top_k. The names lm and kd stand for both parts of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from megamask.model.partition_sums import PartitionSums
from megamask.model.vocabulary import (
    VocabularyShard,
    block_size,
    cap_,
    chunk_size,
    from_ranks,
    pieces,
)

# Lower bound of the student's probability of the other tokens. It keeps quotients finite, and is
# too small to change a loss.
LEAST = 1e-30


@dataclass(frozen=True)
class Distillation:
    """The objective share * kd + (1 - share) * lm, and both of its parts.

    Attributes:
        labels_T: next token of every token.
        teacher_TH: inputs of the head in the dense model.
        weight_VH: the real rows of the head on this rank.
        shard: the place of these rows in the vocabulary.
        temperature: divides the logits of both models in kd.
        top_k: number of named tokens; None takes the whole vocabulary.
        share: weight of kd in the objective.
        logit_cap: the model's cap of its logits; the student's logits arrive with it.
    """

    labels_T: torch.Tensor
    teacher_TH: torch.Tensor
    weight_VH: torch.Tensor
    shard: VocabularyShard
    temperature: float = 1.0
    top_k: int | None = None
    share: float = 1.0
    logit_cap: float | None = None

    def __call__(
        self, logits_TV: torch.Tensor, tokens: slice, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(objective, lm, kd) of a chunk of tokens, each (T,) fp32.

        With ``gradient``, d objective / d logits overwrites the logits.
        """
        labels_T, (teacher, space) = self.labels_T[tokens], self._buffers
        teacher_TV = torch.mm(
            self.teacher_TH[tokens], self.weight_VH.t(), out=teacher[: len(labels_T)]
        )
        if self.logit_cap is not None:
            cap_(teacher_TV, self.logit_cap)
        kind: type[_Block] = _AllTokens if self.top_k is None else _TopTokens
        losses = []
        for rows in pieces(len(labels_T), space.shape[1]):
            block = kind(
                self,
                logits_TV[rows],
                teacher_TV[rows],
                labels_T[rows],
                space[:, : rows.stop - rows.start],
            )
            losses.append((block.lm_T, block.kd_T))
            if gradient:
                block.make_gradient()
        lm_T, kd_T = map(torch.cat, zip(*losses, strict=True))
        return (1 - self.share) * lm_T + self.share * kd_T, lm_T, kd_T

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers for the teacher's logits of a chunk and for two fp32 blocks.

        They are reused, because new memory pages cost a CPU as much time as the matmul.
        """
        columns, device = len(self.weight_VH), self.teacher_TH.device
        chunk = max(min(chunk_size(self.shard, device), len(self.teacher_TH)), 1)
        block = min(block_size(self.shard, device, buffers=2), chunk)
        return self.teacher_TH.new_empty(chunk, columns), self.teacher_TH.new_empty(
            2, block, columns, dtype=torch.float32
        )


class _Block:
    """A block of tokens under both models: the losses, and on demand their gradient.

    The constructor computes the losses with one collective. ``make_gradient`` then overwrites the
    student's logits with the gradient. A subclass computes the divergence and its gradient.

    Attributes:
        ours, theirs: fp32 buffers (T, V) of student and teacher; they hold logits at first and
            exponentials later.
        top_T, teacher_top_T: largest logits on this rank.
        lm_T, kd_T: the losses.
        scale_T: factor from the student's exponentials on this rank to probabilities, at the
            temperature.
        plain_scale_T: the same factor at temperature 1.
    """

    def __init__(
        self,
        objective: Distillation,
        student_TV: torch.Tensor,
        teacher_TV: torch.Tensor,
        labels_T: torch.Tensor,
        space: torch.Tensor,
    ) -> None:
        self.shard, self.top_k = objective.shard, objective.top_k
        self.temperature = objective.temperature
        # temperature^2 from kd, and 1 / temperature from the derivative of the scaled logits
        self.kd_weight = objective.share * objective.temperature
        self.lm_weight = 1 - objective.share
        self.student_TV, (self.ours, self.theirs) = student_TV, space

        # The places of those labels that lie in this rank's part of the vocabulary.
        place_T = labels_T - self.shard.first
        self.here_T = (place_T >= 0) & (place_T < student_TV.shape[1])
        self.at_label = (
            torch.arange(len(labels_T), device=labels_T.device),
            place_T.where(self.here_T, 0),
        )

        # The numbers of this rank: largest logit, logit of the label, sums of exponentials.
        self.top_T = _largest(self.ours.copy_(student_TV))
        label_T = torch.zeros_like(self.top_T)
        if student_TV.shape[1]:
            label_T = self.ours[self.at_label].where(self.here_T, 0)
        plain_T = None
        if self.temperature != 1:
            plain_T = _exp_(self.theirs.copy_(self.ours), self.top_T).sum(1)
        self.teacher_top_T = _largest(self.theirs.copy_(teacher_TV))
        sum_T, *more = self._measure()
        plain_T = sum_T if plain_T is None else plain_T

        # The numbers of all ranks give the losses.
        own = [self.top_T, sum_T, plain_T, label_T, self.teacher_top_T, *more]
        self._conclude(from_ranks(own, self.shard))

    def _conclude(self, every_PNT: torch.Tensor) -> None:
        """Losses and scales from the numbers of all ranks."""
        tops, sums, plains, labels, teacher_tops, *more = every_PNT.unbind(1)
        plain = PartitionSums.of(tops, plains, 1.0)
        student = PartitionSums.of(tops, sums, self.temperature)
        self.lm_T = plain.sum_T.log() - (labels.sum(0) - plain.top_T)
        self.kd_T = self.temperature**2 * self._divergence(student, tops, teacher_tops, *more)
        self.scale_T, self.plain_scale_T = student.share(self.top_T), plain.share(self.top_T)

    def make_gradient(self) -> None:
        """Overwrite the student's logits with the gradient of the objective."""
        self._distil_()
        if self.lm_weight and self.temperature != 1:
            plain = _exp_(self.theirs.copy_(self.student_TV), self.top_T)
            self.ours.add_(plain.mul_((self.lm_weight * self.plain_scale_T)[:, None]))
        if self.lm_weight and self.ours.shape[1]:
            self.ours[self.at_label] -= self.lm_weight * self.here_T
        self.student_TV.copy_(self.ours)

    @property
    def _own_weight(self) -> float:
        """Weight of the student's probabilities at the temperature in the gradient.

        At temperature 1 these are also the probabilities in the gradient of lm.
        """
        return self.kd_weight + (self.lm_weight if self.temperature == 1 else 0.0)

    def _measure(self) -> list[torch.Tensor]:
        """The student's sum of exponentials at the temperature, then more numbers for
        ``_divergence``, all of this rank and (T,).

        Before the call ``ours`` and ``theirs`` hold logits; after it they hold the exponentials
        that ``_distil_`` reads.
        """
        raise NotImplementedError

    def _divergence(
        self,
        student: PartitionSums,
        tops: torch.Tensor,
        teacher_tops: torch.Tensor,
        *more: torch.Tensor,
    ) -> torch.Tensor:
        """KL(teacher || student) at the temperature, (T,), from numbers (P, T) of all ranks."""
        raise NotImplementedError

    def _distil_(self) -> None:
        """Write the gradient of kd to ``ours``.

        The weight of the student's probabilities in it is ``_own_weight``.
        """
        raise NotImplementedError


class _AllTokens(_Block):
    """The divergence over the whole vocabulary.

    With teacher logits t, student logits s, teacher probabilities p and temperature T:

        KL = sum p (t - s) / T + log(sum exp(s / T) / sum exp(t / T))
    """

    def _measure(self) -> list[torch.Tensor]:
        behind = self.ours.sub_(self.theirs)
        teacher_sum_T = _exp_(self.theirs, self.teacher_top_T, self.temperature).sum(1)
        behind_T = torch.linalg.vecdot(self.theirs, behind)
        return [
            _exp_(self.ours.copy_(self.student_TV), self.top_T, self.temperature).sum(1),
            teacher_sum_T,
            behind_T,
        ]

    def _divergence(
        self,
        student: PartitionSums,
        tops: torch.Tensor,
        teacher_tops: torch.Tensor,
        *more: torch.Tensor,
    ) -> torch.Tensor:
        teacher_sums, behind = more
        teacher = PartitionSums.of(teacher_tops, teacher_sums, self.temperature)
        self.teacher_scale_T = teacher.share(self.teacher_top_T)
        mean_T = (behind * teacher.share(teacher_tops)).sum(0)
        return student.log_over(teacher) - mean_T / self.temperature

    def _distil_(self) -> None:
        self.ours.mul_((self._own_weight * self.scale_T)[:, None])
        self.ours.sub_(self.theirs.mul_((self.kd_weight * self.teacher_scale_T)[:, None]))


class _TopTokens(_Block):
    """The divergence over the k most likely tokens of the teacher and one event for all others.

    Every rank lists the k + 1 most likely tokens of its part of the vocabulary. All ranks exchange
    their lists, and the tokens above the (k+1)-th of all lists are the named tokens: so the tie of
    two tokens is never decided by where they lie. The other tokens are the rest of the lists, and
    the tokens in no list (the tail of a rank). The gradient of an other token is proportional to
    its student probability: kd changes only the sum of these probabilities, not their proportions.
    """

    def _measure(self) -> list[torch.Tensor]:
        assert self.top_k is not None
        # This rank's list, filled up where it has fewer rows, and its logits in both models.
        here = min(self.top_k + 1, self.ours.shape[1])
        self.listed_TK = self.theirs.topk(here, sorted=False).indices
        lists = [
            F.pad(logits_TV.gather(1, self.listed_TK), (0, self.top_k + 1 - here), value=-torch.inf)
            for logits_TV in (self.theirs, self.ours)
        ]
        # Sums of exponentials over all tokens, and over the tail alone.
        teacher_sum_T = _exp_(self.theirs, self.teacher_top_T, self.temperature).sum(1)
        sum_T = _exp_(self.ours, self.top_T, self.temperature).sum(1)
        self.exp_TK = self.ours.gather(1, self.listed_TK)
        tails = [
            exp_TV.scatter_(1, self.listed_TK, 0).sum(1) for exp_TV in (self.theirs, self.ours)
        ]
        return [sum_T, teacher_sum_T, *tails, *torch.cat(lists, 1).unbind(1)]

    def _divergence(
        self,
        student: PartitionSums,
        tops: torch.Tensor,
        teacher_tops: torch.Tensor,
        *more: torch.Tensor,
    ) -> torch.Tensor:
        teacher_sums, teacher_tails, tails, *lists = more
        teacher = PartitionSums.of(teacher_tops, teacher_sums, self.temperature)
        theirs_PKT, ours_PKT = torch.stack(lists, 1).chunk(2, 1)
        # A token is named if its teacher logit is above the (k+1)-th largest of all lists.
        least_T = theirs_PKT.flatten(0, 1).topk(theirs_PKT.shape[1], dim=0).values[-1]
        named_PKT = (theirs_PKT > least_T) & theirs_PKT.isfinite()
        # The probability of the other tokens under the teacher, over that under the student.
        left_T = teacher.left(theirs_PKT, named_PKT, teacher_tops, teacher_tails)
        self.ratio_T = left_T / student.left(ours_PKT, named_PKT, tops, tails).clamp_min(LEAST)
        p_PKT = teacher.share(theirs_PKT)
        # This rank's part of the lists, for the gradient.
        rank, here = self.shard.group.rank() if self.shard.group else 0, self.listed_TK.shape[1]
        self.named_TK, self.p_TK = named_PKT[rank, :here].t(), p_PKT[rank, :here].t()
        # The terms of the named tokens and of the other tokens.
        gap_PKT = (theirs_PKT - ours_PKT) / self.temperature + student.log_over(teacher)
        return (p_PKT * gap_PKT).where(named_PKT, 0).sum((0, 1)) + torch.xlogy(left_T, self.ratio_T)

    def _distil_(self) -> None:
        others_T1 = (self.scale_T * (self._own_weight - self.kd_weight * self.ratio_T))[:, None]
        named_TK = (
            self.exp_TK * (self.scale_T * self._own_weight)[:, None] - self.kd_weight * self.p_TK
        )
        self.ours.mul_(others_T1).scatter_(
            1, self.listed_TK, named_TK.where(self.named_TK, self.exp_TK * others_T1)
        )


def _largest(logits_TV: torch.Tensor) -> torch.Tensor:
    """The largest logit of every token on this rank, (T,); -inf where the rank has no rows."""
    if logits_TV.shape[1]:
        return logits_TV.amax(1)
    return logits_TV.new_full((len(logits_TV),), -torch.inf)


def _exp_(logits_TV: torch.Tensor, top_T: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """exp((logits - top) / temperature) in place of the logits."""
    logits_TV.sub_(top_T[:, None])
    if temperature != 1:
        logits_TV.mul_(1 / temperature)
    return logits_TV.exp_()
