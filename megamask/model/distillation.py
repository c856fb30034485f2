"""Distillation from the dense model, beside next-token prediction, through the frozen vocabulary
matrix that both models share.

kd is T^2 KL(teacher || student) in nats per token, both distributions at temperature T; the factor
keeps its gradient as large as that of the text (Hinton, Vinyals, Dean 2015). The teacher's logits
are made from its hidden states, some tokens at a time.

With top_k, the tokens that the teacher finds likeliest stand for themselves, and all others
together for one event. That keeps what
renormalising over the k tokens loses: the student is told how much is left for the others (though
not how to divide it), and kd stays a divergence, never above that of the whole vocabulary. Tokens
that tie with the last of the k may stand for themselves too.

Shapes: T tokens, V this rank's real rows of the vocabulary, H hidden, P ranks that share the
vocabulary, K = top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from megamask.model.vocabulary import VocabularyShard, block_size, chunk_size, from_ranks, pieces

# of what the student leaves for the others: quotients stay finite, and it is far below what shows
LEAST = 1e-30


@dataclass(frozen=True)
class Distillation:
    """The objective share * kd + (1 - share) * lm, measured with both of its parts."""

    labels_T: torch.Tensor
    teacher_TH: torch.Tensor  # the dense model's hidden states, as the head sees them
    weight_VH: torch.Tensor  # the head's real rows
    shard: VocabularyShard
    temperature: float = 1.0
    top_k: int | None = None
    share: float = 1.0

    def __call__(
        self, logits_TV: torch.Tensor, tokens: slice, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(objective, lm, kd) of these tokens, each (T,) fp32; with ``gradient``, d objective / d
        logits in place of the logits.
        """
        labels_T, (teacher, space) = self.labels_T[tokens], self._buffers
        teacher_TV = torch.mm(
            self.teacher_TH[tokens], self.weight_VH.t(), out=teacher[: len(labels_T)]
        )
        kind, found = _AllTokens if self.top_k is None else _TopTokens, []
        for rows in pieces(len(labels_T), space.shape[1]):
            block = kind(
                self,
                logits_TV[rows],
                teacher_TV[rows],
                labels_T[rows],
                space[:, : rows.stop - rows.start],
            )
            found.append((block.lm_T, block.kd_T))
            if gradient:
                block.make_gradient()
        lm_T, kd_T = map(torch.cat, zip(*found, strict=True))
        return (1 - self.share) * lm_T + self.share * kd_T, lm_T, kd_T

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For the teacher's logits of a chunk, and for two fp32 blocks: fresh pages cost a CPU as
        much as the matmul.
        """
        columns, device = len(self.weight_VH), self.teacher_TH.device
        chunk = max(min(chunk_size(self.shard, device), len(self.teacher_TH)), 1)
        block = min(block_size(self.shard, device, buffers=2), chunk)
        return self.teacher_TH.new_empty(chunk, columns), self.teacher_TH.new_empty(
            2, block, columns, dtype=torch.float32
        )


@dataclass(frozen=True)
class _Partition:
    """Sums of exp((logit - top) / temperature) over the vocabulary of all ranks, (T,), the same
    bits on each.
    """

    top_T: torch.Tensor
    sum_T: torch.Tensor
    temperature: float

    @staticmethod
    def of(tops_PT: torch.Tensor, sums_PT: torch.Tensor, temperature: float) -> _Partition:
        """From every rank's largest logit, and its sum relative to that."""
        top_T = tops_PT.amax(0)
        return _Partition(
            top_T, (sums_PT * ((tops_PT - top_T) / temperature).exp()).sum(0), temperature
        )

    def share(self, logits_T: torch.Tensor) -> torch.Tensor:
        """Probability of logits (..., T)."""
        return ((logits_T - self.top_T) / self.temperature).exp() / self.sum_T

    def left(
        self,
        listed_PKT: torch.Tensor,
        named_PKT: torch.Tensor,
        tops_PT: torch.Tensor,
        tails_PT: torch.Tensor,
    ) -> torch.Tensor:
        """Probability of all but the named tokens: of the others that are listed, and of every
        rank's tail (sums relative to its top).
        """
        return (
            self.share(listed_PKT).where(~named_PKT, 0).sum(1) + tails_PT * self.share(tops_PT)
        ).sum(0)

    def log_over(self, other: _Partition) -> torch.Tensor:
        """log of the quotient of both sums, with the logits that they are relative to."""
        return (self.top_T - other.top_T) / self.temperature + (self.sum_T / other.sum_T).log()


class _Block:
    """Some tokens under both models: their losses, and then the gradient in place of the student's
    logits. Needs one collective.

    Attributes:
        ours, theirs: fp32 space for student and teacher, (T, V) each: logits, then exponentials.
        top_T, teacher_top_T: this rank's largest logits.
        lm_T, kd_T: the losses.
        scale_T, plain_scale_T: turn this rank's exponentials of the student into probabilities, at
            the temperature and at 1.
    """

    def __init__(
        self,
        objective: Distillation,
        student_TV: torch.Tensor,
        teacher_TV: torch.Tensor,
        labels_T: torch.Tensor,
        space: torch.Tensor,
    ) -> None:
        self.shard, self.temperature, self.top_k = (
            objective.shard,
            objective.temperature,
            objective.top_k,
        )
        self.kd_weight, self.lm_weight = (
            objective.share * objective.temperature,
            1 - objective.share,
        )  # T^2 and 1 / T of the logits
        self.student_TV, (self.ours, self.theirs) = student_TV, space
        place_T = labels_T - self.shard.first
        self.here_T = (place_T >= 0) & (place_T < student_TV.shape[1])
        self.at_label = (
            torch.arange(len(labels_T), device=labels_T.device),
            place_T.where(self.here_T, 0),
        )

        self.top_T = _largest(self.ours.copy_(student_TV))
        label_T = (
            self.ours[self.at_label].where(self.here_T, 0)
            if student_TV.shape[1]
            else torch.zeros_like(self.top_T)
        )
        plain_T = (
            None
            if self.temperature == 1
            else _exp_(self.theirs.copy_(self.ours), self.top_T).sum(1)
        )
        self.teacher_top_T = _largest(self.theirs.copy_(teacher_TV))
        sum_T, *more = self._measure()
        mine = [
            self.top_T,
            sum_T,
            sum_T if plain_T is None else plain_T,
            label_T,
            self.teacher_top_T,
            *more,
        ]
        self._conclude(from_ranks(mine, self.shard))

    def _conclude(self, every_PNT: torch.Tensor) -> None:
        """Losses and scales from the numbers that all ranks measured."""
        tops, sums, plains, labels, teacher_tops, *more = every_PNT.unbind(1)
        plain, student = (
            _Partition.of(tops, plains, 1.0),
            _Partition.of(tops, sums, self.temperature),
        )
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
        """Of the student's probabilities at the temperature in the gradient: at 1, those of lm are
        the same.
        """
        return self.kd_weight + (self.lm_weight if self.temperature == 1 else 0.0)

    def _measure(self) -> list[torch.Tensor]:
        """The student's sum of exponentials at the temperature, and what else ``_divergence`` needs
        of this rank, (T,) each.

        Before: logits in ``ours`` and ``theirs``. After: what ``_distil_`` needs.
        """
        raise NotImplementedError

    def _divergence(
        self,
        student: _Partition,
        tops: torch.Tensor,
        teacher_tops: torch.Tensor,
        *more: torch.Tensor,
    ) -> torch.Tensor:
        """KL(teacher || student) at the temperature, (T,), from what all ranks measured, (P, T)
        each.
        """
        raise NotImplementedError

    def _distil_(self) -> None:
        """Leave the gradient of kd in ``ours``, with the student's probabilities weighted by
        ``_own_weight``.
        """
        raise NotImplementedError


class _AllTokens(_Block):
    """The divergence over the whole vocabulary: sum p (t - s) / T + log(sum exp(s / T) / sum exp(t
    / T)).
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
        student: _Partition,
        tops: torch.Tensor,
        teacher_tops: torch.Tensor,
        *more: torch.Tensor,
    ) -> torch.Tensor:
        teacher_sums, behind = more
        teacher = _Partition.of(teacher_tops, teacher_sums, self.temperature)
        self.teacher_scale_T = teacher.share(self.teacher_top_T)
        mean_T = (behind * teacher.share(teacher_tops)).sum(0)
        return student.log_over(teacher) - mean_T / self.temperature

    def _distil_(self) -> None:
        self.ours.mul_((self._own_weight * self.scale_T)[:, None])
        self.ours.sub_(self.theirs.mul_((self.kd_weight * self.teacher_scale_T)[:, None]))


class _TopTokens(_Block):
    """The divergence of the k tokens that the teacher finds likeliest and of one event for all
    others.

    Every rank lists its own k, and from all lists each knows which of its are named. Those of a
    list that are not, and tokens on no list (the tail), are the others; the student shares out what
    the teacher leaves to them as it does already.
    """

    def _measure(self) -> list[torch.Tensor]:
        assert self.top_k is not None
        here = min(self.top_k, self.ours.shape[1])
        self.listed_TK = self.theirs.topk(here, sorted=False).indices
        lists = [
            F.pad(one.gather(1, self.listed_TK), (0, self.top_k - here), value=-torch.inf)
            for one in (self.theirs, self.ours)
        ]
        teacher_sum_T = _exp_(self.theirs, self.teacher_top_T, self.temperature).sum(1)
        sum_T = _exp_(self.ours, self.top_T, self.temperature).sum(1)
        self.exp_TK = self.ours.gather(1, self.listed_TK)
        tails = [one.scatter_(1, self.listed_TK, 0).sum(1) for one in (self.theirs, self.ours)]
        return [sum_T, teacher_sum_T, *tails, *torch.cat(lists, 1).unbind(1)]

    def _divergence(
        self,
        student: _Partition,
        tops: torch.Tensor,
        teacher_tops: torch.Tensor,
        *more: torch.Tensor,
    ) -> torch.Tensor:
        teacher_sums, teacher_tails, tails, *lists = more
        teacher = _Partition.of(teacher_tops, teacher_sums, self.temperature)
        theirs_PKT, ours_PKT = torch.stack(lists, 1).chunk(2, 1)
        least_T = theirs_PKT.flatten(0, 1).topk(theirs_PKT.shape[1], dim=0).values[-1]
        named_PKT = (theirs_PKT >= least_T) & theirs_PKT.isfinite()
        left_T = teacher.left(theirs_PKT, named_PKT, teacher_tops, teacher_tails)
        self.ratio_T = left_T / student.left(ours_PKT, named_PKT, tops, tails).clamp_min(LEAST)
        p_PKT = teacher.share(theirs_PKT)
        rank, here = self.shard.group.rank() if self.shard.group else 0, self.listed_TK.shape[1]
        self.named_TK, self.p_TK = named_PKT[rank, :here].t(), p_PKT[rank, :here].t()
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
    """(T,); -inf where this rank has no rows."""
    return (
        logits_TV.amax(1)
        if logits_TV.shape[1]
        else logits_TV.new_full((len(logits_TV),), -torch.inf)
    )


def _exp_(logits_TV: torch.Tensor, top_T: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """exp((logits - top) / temperature) in place of the logits."""
    logits_TV.sub_(top_T[:, None])
    if temperature != 1:
        logits_TV.mul_(1 / temperature)
    return logits_TV.exp_()
