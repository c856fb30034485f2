"""MaskPro (arXiv 2506.12876): learns masks from the losses of drawn masks, with forward passes
alone.

A step draws K masks m_k from the logits (score.py), measures the loss of each on
the step's samples, and moves

    logits -= lr / K * sum_k (r_k - b_k) * score(m_k),   r_k = loss(W * m_k) - loss(W * m_0)

with m_0 the prior mask, from which the logits start: ``initial_logit`` where it keeps a weight,
else 0. The score is the gradient of log P(m_k), so with any b_k that does not depend on m_k the
mean of the move is - lr times the gradient of the expected loss. What b_k decides is its variance
(learn.maskpro.baseline):

- tracker: the moving average of past residuals, delta = a delta + (1 - a) r (the paper's). It lags
  behind what is learned, and residuals differ between samples.
- leave_one_out: the mean residual of the step's other masks.
- hard_mask: the loss of the hard mask, the likeliest, on the same samples, in a forward pass of its
  own. A mask gains only if it beats what would be the result now.

Masks divide the micro-batches of a step (data=split: mask k sees micro-batches k, k + K, ...), or
each sees all of them (data=shared: K times the work, and what makes samples hard cancels from
differences between masks). Then, and with hard_mask, m_0 cancels altogether.

Nothing is kept for a backward pass: a masked weight exists while its layer computes. Masks are not
stored either, since keyed noise draws them again for the update. Ranks that share layers (TP)
exchange no gradients, replicas (DP) only K sums of losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.errors import LearningError
from megamask.learn.learner import StepResult
from megamask.learn.masked_model import MaskedModel
from megamask.learn.maskpro.samples import InitialLosses, numbers_of
from megamask.learn.maskpro.score import add_scores_of, choose_score, sample_of
from megamask.parallel.mask_context import Measured, RunningSample
from megamask.parallel.masked_linear import MaskedLinear, folded_in_turn
from megamask.parallel.mesh import Mesh
from megamask.sparsity.noise import NoiseKey


@dataclass(frozen=True, kw_only=True)
class PolicyResult(StepResult):
    """What a step measured, means over its masks; ``loss`` and ``lm_loss`` are the same.

    Attributes:
        residual: how much worse the drawn masks are than the mask that they are compared with, m_0
            or the hard mask; None where m_0 cancels.
        advantage: root mean square of r_k - b_k, in nats; times lr / K, it is how far the logit of
            a drawn position moves.
    """

    residual: float | None
    advantage: float


class Tracker:
    """The moving average of residuals: the whole state of this learner besides the logits."""

    def __init__(self, decay: float) -> None:
        self.decay, self.delta = decay, 0.0

    def update(self, residual: float) -> float:
        """Take in a step's residual and return the average."""
        self.delta = self.decay * self.delta + (1 - self.decay) * residual
        return self.delta


def advantages(baseline: str, residuals_K: list[float], tracker: Tracker) -> list[float]:
    """r_k - b_k of every mask. The tracker takes in the step first: of one mask, r - delta is decay
    times r less the delta before.
    """
    if baseline == "hard_mask":  # what residuals are relative to already
        return residuals_K
    if baseline == "tracker":
        delta = tracker.update(fmean(residuals_K))
        return [residual - delta for residual in residuals_K]
    total, others = sum(residuals_K), len(residuals_K) - 1
    return [residual - (total - residual) / others for residual in residuals_K]


class MaskPro:
    """The policy-gradient learner.

    Args:
        config: settings that ``PolicyMethod.check`` has seen.
        mesh: the processes.
        masked_model: the model; its logits hold the prior, and are set to ``initial_logit`` times
            m_0.
    """

    def __init__(self, config: Config, mesh: Mesh, masked_model: MaskedModel) -> None:
        self.config, self.mesh, self.masked_model = config, mesh, masked_model
        self.section = config.learn.maskpro
        self.tracker = Tracker(self.section.tracker_decay)
        self.initial = {
            linear.parameter_id: linear.mask_statistics(1.0)[0]
            for linear in masked_model.linears.values()
        }
        self.initial_losses: InitialLosses | None = None
        for linear in masked_model.linears.values():
            initial = linear.site.mask_of(self.initial[linear.parameter_id])
            _set_logits(linear, initial, self.section.initial_logit)

    @torch.no_grad()
    def step(self, step: int, plan: BatchPlan) -> PolicyResult:
        """Learn from the global batch of ``step`` (counted from 0); the samples of ``plan`` are
        ``Reused``.

        Raises:
            LearningError: a loss is not finite; the logits are unchanged.
        """
        # the losses of the drawn masks
        losses_K, residuals_K, first_draw = self._measure(step, plan)
        if not all(map(math.isfinite, [*losses_K, *residuals_K])):
            fix = "Lower learn.maskpro.lr; start again to go on from the last snapshot."
            found = f"{losses_K}, and less what they are compared with {residuals_K}"
            raise LearningError(
                f"step {step + 1}: the losses of the drawn masks are {found}, not finite. {fix}"
            )

        # update: draw every mask again, and add its weighted score
        advantages_K = advantages(self.section.baseline, residuals_K, self.tracker)
        rate = self.section.lr
        coefficients = [-rate / len(advantages_K) * advantage for advantage in advantages_K]
        for linear in self.masked_model.linears.values():
            assert linear.mask_logits is not None
            key = NoiseKey(self.config.seed, step).of(linear.parameter_id)
            add_scores = add_scores_of(linear.backend)
            kind = choose_score(self.section.score, linear.site.pattern)
            add_scores(linear.mask_logits, linear.site.of_units, key, coefficients, kind)
        loss, size = fmean(losses_K), math.sqrt(fmean(one * one for one in advantages_K))
        return PolicyResult(
            lm_loss=loss,
            loss=loss,
            lr=rate,
            residual=fmean(residuals_K) if self._compares else None,
            advantage=size,
            first_draw=first_draw,
        )

    def state(self, logits: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """The moving average of residuals, for a snapshot."""
        return {"tracker": self.tracker.delta}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a loaded ``state``."""
        self.tracker.delta = state["tracker"]

    def _measure(
        self, step: int, plan: BatchPlan
    ) -> tuple[list[float], list[float], dict[int, Measured]]:
        """(losses, residuals) of the masks, means over all samples that a mask saw on any replica,
        and what the first draw measured. The losses stay on the device up to the end of the step,
        so that the host waits once.
        """
        self.masked_model.model.eval()
        masks, split = self.section.masks, self.section.data == "split"
        sums = torch.zeros(2, masks, dtype=torch.float64, device=self.mesh.device)
        key, first_draw = NoiseKey(self.config.seed, step), None
        for number, tokens, labels in plan.micro_batches(step):
            compared = self._compared_losses(plan, numbers_of(plan, step, number), tokens, labels)
            for mask in [number % masks] if split else range(masks):
                sample = sample_of(replace(key, micro_batch=mask))
                running = RunningSample(sample, is_first=first_draw is None)
                with self._drawing(running):
                    losses = self._losses(tokens, labels)
                sums[:, mask] += torch.stack([losses.mean(), (losses - compared).mean()])
                first_draw = first_draw or running.measured
        count = plan.accumulations * (
            1 if not split else 1 / masks
        )  # micro-batches of a mask, a replica's share
        losses_K, residuals_K = (self.mesh.mean_over_dp(sums) / count).tolist()
        assert first_draw is not None
        return losses_K, residuals_K, first_draw

    def _compared_losses(
        self, plan: BatchPlan, numbers: list[int], tokens: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """What each sample of a micro-batch costs without exploring, (B,): under the hard mask,
        under m_0, or 0 where that cancels.
        """
        if self.section.baseline == "hard_mask":
            with folded_in_turn(self._linears, MaskedLinear.hard_codes):
                return self._losses(tokens, labels)
        if not self._compares:
            return torch.zeros(len(numbers), dtype=torch.float64, device=self.mesh.device)
        if self.initial_losses is None:
            self.initial_losses = InitialLosses(
                plan.dataset, plan.micro_batch, self._losses_of_initial
            )
        return self.initial_losses(numbers)

    def _losses_of_initial(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with folded_in_turn(self._linears, lambda linear: self.initial[linear.parameter_id]):
            return self._losses(tokens, labels)

    def _losses(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss of every sample, (B,) fp64, under what the linears now see."""
        rows, targets = self.mesh.on_device(tokens), self.mesh.on_device(labels)
        losses: torch.Tensor = self.masked_model.model.token_losses(rows, targets)
        return losses.double().mean(1)

    @property
    def _compares(self) -> bool:
        """Whether residuals count: between masks that see the same samples, what they are relative
        to cancels.
        """
        return self.section.baseline != "leave_one_out" or self.section.data == "split"

    @property
    def _linears(self) -> Iterable[MaskedLinear]:
        return self.masked_model.linears.values()

    @contextmanager
    def _drawing(self, running: RunningSample) -> Iterator[None]:
        self.masked_model.switch.running = running
        try:
            yield
        finally:
            self.masked_model.switch.running = None


@torch.no_grad()
def _set_logits(linear: MaskedLinear, mask_OI: torch.Tensor, kept: float) -> None:
    assert linear.mask_logits is not None
    pattern = linear.site.pattern
    kept_OUG = pattern.of_units(mask_OI).unflatten(1, (-1, pattern.units.m)).transpose(1, 2)
    linear.mask_logits.copy_(kept_OUG).mul_(kept)
