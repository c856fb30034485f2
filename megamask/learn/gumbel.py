"""One learning step: micro-batches through the masked model, gradients of the logits alone, one
optimizer step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.errors import LearningError
from megamask.learn.masked_model import MaskedModel
from megamask.learn.schedules import linear
from megamask.model.objective import loss_of
from megamask.optim.optimizers import build_optimizer
from megamask.optim.schedule import Schedule, gradient_norm
from megamask.optim.zero1 import Replicas
from megamask.parallel.mesh import Mesh
from megamask.parallel.step_draw import begin_step, end_step
from megamask.sparsity.draw import GradientSink, Sample
from megamask.sparsity.noise import NoiseKey

log = logging.getLogger(__name__)
MicroBatch = tuple[int, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step measured, means over the global batch, the norm summed over all layers and
    shards.
    """

    lm_loss: float  # also where it is not learned from
    weight_norm: float  # sum |W * M|^2
    weight_norm_term: float  # coef * weight_norm, subtracted from the loss
    loss: float  # of the text and of the dense model, less the term
    grad_norm: float
    lr: float
    kappa: float
    tau: float
    kd_loss: float | None = None  # of distillation


class Learner:
    """The Gumbel-softmax learner (MaskLLM, Alg. 1) on Megatron's schedule of micro-batches and its
    DDP.

    Raises:
        ConfigError: an optimizer schedule that cannot work, more replicas than a distributed
            optimizer has layers for.
    """

    def __init__(self, config: Config, mesh: Mesh, masked_model: MaskedModel) -> None:
        self.config, self.mesh, self.masked_model = config, mesh, masked_model
        learn = config.learn
        in_fp32 = learn.state.grads == "fp32"  # else in the dtype of the logits
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=in_fp32, overlap_grad_reduce=False, use_distributed_optimizer=False
        )
        model_config = masked_model.model.config
        self.ddp = DistributedDataParallel(
            config=model_config, ddp_config=settings, module=masked_model.model
        )
        self.replicas = self._divide()
        model_config.no_sync_func = self.replicas.no_sync if self.replicas else self.ddp.no_sync
        model_config.finalize_model_grads_func = self._finalize
        masked_model.switch.regenerate = learn.state.masked_weight == "regenerate"
        self.loss = loss_of(learn.distillation, masked_model.switch)
        self.draws_once = learn.sampling.draws == "step"
        self.optimizer = build_optimizer(config, list(masked_model.linears.values()), self.replicas)
        self.schedule = Schedule(learn)

    def step(self, step: int, plan: BatchPlan) -> StepResult:
        """Learn from the global batch of ``step`` (counted from 0).

        Raises:
            LearningError: the loss or the gradient is not finite; the logits are unchanged.
        """
        sample, norm_coef = self._sample(step, plan.accumulations)
        self.ddp.train()
        self._begin_gradients()
        measured = self._forward_backward(sample, norm_coef, plan.micro_batches(step), plan)
        weight_norm, objective, lm_loss, *kd_loss = self.mesh.mean_over_dp(
            torch.stack(measured).mean(0)
        ).tolist()
        grads = [logits.main_grad for logits in self.optimizer.logits]  # type: ignore[attr-defined]
        norm = gradient_norm(grads, self.mesh, self.replicas)
        grad_norm = float(norm)
        term = norm_coef * plan.accumulations * weight_norm
        self._refuse_nan(step, objective, grad_norm)
        rate = self.schedule.rate(step)
        self.optimizer.step(step, rate, self.schedule.clip_factor(norm))
        if self.replicas:
            self.replicas.share_logits()
        return StepResult(
            lm_loss,
            weight_norm,
            term,
            objective - term,
            grad_norm,
            rate,
            sample.kappa,
            sample.tau,
            *kd_loss,
        )

    def _begin_gradients(self) -> None:
        """What ``ddp.zero_grad_buffer`` does but for clearing: the first draw of a step replaces
        what the buffers hold.
        """
        for group in self.ddp.bucket_groups + self.ddp.expert_parallel_bucket_groups:
            group.reset()

    def _divide(self) -> Replicas | None:
        if not self.config.learn.optimizer.distributed:
            return None
        if self.mesh.dp == 1:
            if self.mesh.is_main:
                log.warning("learn.optimizer.distributed has no effect: there is one replica")
            return None
        return Replicas(self.masked_model.mask_logits, self.mesh)

    def _sample(self, step: int, accumulations: int) -> tuple[Sample, float]:
        """What the step draws, and the coefficient of the weight-norm term a micro-batch."""
        learn = self.config.learn
        progress = step / learn.steps
        coef = linear(learn.weight_norm, progress)
        sample = Sample(
            key=NoiseKey(self.config.seed, step),
            kappa=linear(learn.sampling.kappa, progress),
            tau=linear(learn.sampling.tau, progress),
            hard=learn.sampling.mode == "hard",
        )
        return sample, coef / accumulations  # the schedule divides the LM loss by the same number

    def _forward_backward(
        self,
        sample: Sample,
        norm_coef: float,
        micro_batches: Iterator[MicroBatch],
        plan: BatchPlan,
    ) -> list[torch.Tensor]:
        """(weight norm, objective and its parts) of every micro-batch of this replica; gradients
        end in ``main_grad``.
        """
        try:
            if self.draws_once:
                self._sample_for_step(sample, norm_coef, plan.accumulations)
            return get_forward_backward_func()(
                forward_step_func=partial(self._forward, sample, norm_coef, plan.replica),
                data_iterator=micro_batches,
                model=[self.ddp],
                num_microbatches=plan.accumulations,
                seq_length=self.config.data.seq_length,
                micro_batch_size=plan.micro_batch,
                forward_only=False,
            )
        finally:
            self.masked_model.switch.sample = None
            for masked in self.masked_model.linears.values():
                masked.drop_draw()

    def _sample_for_step(self, sample: Sample, norm_coef: float, accumulations: int) -> None:
        in_fp32 = accumulations > 1 and self.config.learn.state.grads == "fp32"
        linears = list(self.masked_model.linears.values())
        begin_step(linears, sample, norm_coef * accumulations, in_fp32)

    def _finalize(self, models: list[Any], *args: Any, **kwargs: Any) -> None:
        """All micro-batches are done: turn summed weight gradients into logit gradients, then
        reduce over replicas.
        """
        if self.draws_once:
            for number in end_step(list(self.masked_model.linears.values())):
                if self.replicas:
                    self.replicas.start_sum(number)
        if self.replicas:
            self.replicas.finish_sums()
        else:
            finalize_model_grads(models, *args, **kwargs)

    def _forward(
        self,
        sample: Sample,
        norm_coef: float,
        first: int,
        micro_batches: Iterator[MicroBatch],
        model: Any,
    ) -> tuple[torch.Tensor, Any]:
        number, tokens, labels = next(micro_batches)
        switch, device = self.masked_model.switch, self.mesh.device
        if not self.draws_once:
            switch.sample = replace(sample, key=replace(sample.key, micro_batch=number))
            switch.sink = GradientSink(norm_coef, replace=number == first)
            switch.statistics = number == first
        losses = self.loss(self.masked_model.model, tokens.to(device), labels.to(device))
        norm = self.mesh.sum_over_tp(
            torch.stack([one.to(device) for one in switch.norms.values()]).sum()
        )

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean = output.mean()
            parts = [part.mean().double() for part in (losses.lm, losses.kd) if part is not None]
            return mean, torch.stack([norm, mean.detach().double(), *parts])

        return losses.objective, loss

    def _refuse_nan(self, step: int, loss: float, grad_norm: float) -> None:
        if loss != loss or grad_norm != grad_norm or float("inf") in (loss, grad_norm):
            fix = "Lower learn.optimizer.lr or the scale learn.sampling.kappa; start again to go on from the last snapshot."
            raise LearningError(
                f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}, not finite. {fix}"
            )
