"""One learning step with gradients: micro-batches through the masked model, gradients at the mask
logits alone, one update.

Sources: MaskLLM (arXiv 2409.17481), Algorithm 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.errors import LearningError
from megamask.learn.annealing import between, sample_of
from megamask.learn.learner import StepResult
from megamask.learn.masked_model import MaskedModel
from megamask.model.hidden_match import HiddenMatch
from megamask.model.objective import loss_of
from megamask.optim.optimizers import build_optimizer
from megamask.optim.schedule import Schedule, gradient_norm
from megamask.optim.update_measure import measure_update
from megamask.optim.zero1 import Replicas
from megamask.parallel.mask_context import Measured, RunningSample
from megamask.parallel.mesh import Mesh
from megamask.parallel.step_draw import StepDraws
from megamask.sparsity.draw import Sample

log = logging.getLogger(__name__)
MicroBatch = tuple[int, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class GradientResult(StepResult):
    """What a step with gradients measured: means over the global batch; the weight norm is a sum
    over all layers and shards.

    Attributes:
        weight_norm: sum |W * M|^2.
        weight_norm_term: the coefficient times ``weight_norm``, which is subtracted from the loss.
        grad_norm: of all mask logits, before clipping.
        clip_factor: that made the gradient no longer than ``learn.optimizer.clip``.
        kappa: scale of the logits.
        tau: temperature.
        kd_loss: the divergence from the dense model; None where it takes no part.
        hidden_loss: the distance of the layers from those of the dense model; None where it takes
            no part.
        signal_share, below_epsilon, relative_step: as ``UpdateMeasure``; None in steps that do not
            measure the update.
    """

    weight_norm: float
    weight_norm_term: float
    grad_norm: float
    clip_factor: float
    kappa: float
    tau: float
    kd_loss: float | None = None
    hidden_loss: float | None = None
    signal_share: float | None = None
    below_epsilon: float | None = None
    relative_step: float | None = None


@dataclass
class _RunningStep:
    """What the micro-batches of one step share.

    Attributes:
        sample: what is drawn; the key of a mask gets the number of a micro-batch, the first of the
            global batch that the mask serves.
        norm_coef: of the weight-norm term, for one micro-batch.
        first: number of the first micro-batch of this replica.
        first_draw: what the first draw of the step measured, by parameter id.
        uses: how many micro-batches of this replica each shared mask to come serves.
        shared: number of the micro-batch in the key of the shared masks of now; None before them.
        measured: what the draw of the shared masks of now measured, by parameter id.
    """

    sample: Sample
    norm_coef: float
    first: int
    first_draw: Mapping[int, Measured] = field(default_factory=dict)
    uses: Iterator[int] = field(default_factory=lambda: iter(()))
    shared: int | None = None
    measured: Mapping[int, Measured] = field(default_factory=dict)


class GradientLearner:
    """Learns from the gradients of relaxed masks, on Megatron's schedule of micro-batches and its
    DDP.

    Raises:
        ConfigError: an optimizer schedule that cannot work, or more replicas than a distributed
            optimizer has layers for.
    """

    def __init__(self, config: Config, mesh: Mesh, masked_model: MaskedModel) -> None:
        self.config, self.mesh, self.masked_model = config, mesh, masked_model
        learn, linears = config.learn, list(masked_model.linears.values())
        # Megatron's DDP: gradient buffers of the mask logits, and their reduction over replicas
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
        # masks and losses
        masked_model.switch.regenerate = learn.state.masked_weight == "regenerate"
        self.step_draws = StepDraws(linears) if learn.sampling.span > 1 else None
        self.match = self._match()
        self.loss = loss_of(learn.distillation, masked_model.switch, self.match)
        # updates
        self.optimizer = build_optimizer(config, linears, self.replicas)
        self.schedule = Schedule(config)

    def step(self, step: int, plan: BatchPlan) -> GradientResult:
        """Learn from the global batch of ``step`` (counted from 0).

        Raises:
            LearningError: the loss or the gradient is not finite; the logits are unchanged.
        """
        # gradients at the mask logits
        running = self._begin(step, plan)
        measured = self._forward_backward(running, plan.micro_batches(step), plan)
        names = list(measured[0])
        values = [torch.stack(list(one.values())) for one in measured]
        averages = self.mesh.mean_over_dp(torch.stack(values).mean(0))
        grads = [logits.main_grad for logits in self.optimizer.logits]  # type: ignore[attr-defined]
        norm = gradient_norm(grads, self.mesh, self.replicas)
        # the one time that the host waits for the device
        grad_norm, *means = torch.cat([norm[None], averages]).tolist()
        parts = dict(zip(names, means, strict=True))
        weight_norm, objective = parts.pop("weight_norm"), parts.pop("objective")
        objective += self.config.learn.distillation.hidden * parts.get("hidden_loss", 0.0)
        self._refuse_nan(step, objective, grad_norm)

        # update
        rate = self.schedule.rate(step)
        self.optimizer.step(step, rate, self.schedule.clip_factor(norm))
        if self.replicas:
            self.replicas.share_logits()

        # report
        term = running.norm_coef * plan.accumulations * weight_norm
        return GradientResult(
            weight_norm=weight_norm,
            weight_norm_term=term,
            loss=objective - term,
            grad_norm=grad_norm,
            clip_factor=clip / max(clip, grad_norm) if (clip := self.schedule.clip) else 1.0,
            lr=rate,
            kappa=running.sample.kappa,
            tau=running.sample.tau,
            first_draw=running.first_draw,
            **parts,
            **self._measure(step),
        )

    def state(self, logits: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """The optimizer's state for a snapshot, split as ``logits``, the model's sharded state."""
        return self.optimizer.sharded_state_dict(logits, is_loading=is_loading)

    def load(self, state: dict[str, Any]) -> None:
        """Take over a loaded ``state``."""
        self.optimizer.load_state_dict(state)

    # the parts of a step

    def _begin(self, step: int, plan: BatchPlan) -> _RunningStep:
        """Start the gradient buffers anew, and choose what the step draws."""
        self.ddp.train()
        # The buckets are reset, the buffers are not cleared: the first draw of a step replaces what
        # they hold (RunningSample.is_first, LayerDraw.finish).
        for group in self.ddp.bucket_groups + self.ddp.expert_parallel_bucket_groups:
            group.reset()
        learn = self.config.learn
        # Megatron's schedule divides the loss of a micro-batch by the same number
        norm_coef = between(learn.weight_norm, step / learn.steps) / plan.accumulations
        running = _RunningStep(sample_of(self.config, step), norm_coef, plan.replica)
        if self.step_draws:
            uses = learn.sampling.uses(plan.accumulations, plan.replicas, plan.replica)
            running.uses = iter(uses)
        return running

    def _forward_backward(
        self, running: _RunningStep, micro_batches: Iterator[MicroBatch], plan: BatchPlan
    ) -> list[dict[str, torch.Tensor]]:
        """Weight norm, objective and the parts of the loss of every micro-batch of this replica,
        0-d fp64 each; the gradients are in ``main_grad`` afterwards.
        """
        try:
            return get_forward_backward_func()(
                forward_step_func=partial(self._forward, running),
                data_iterator=micro_batches,
                model=[self.ddp],
                num_microbatches=plan.accumulations,
                seq_length=self.config.data.seq_length,
                micro_batch_size=plan.micro_batch,
                forward_only=False,
            )
        finally:
            self.masked_model.switch.running = None
            if self.step_draws:
                self.step_draws.drop()
            if self.match:
                self.match.drop()

    def _forward(
        self, running: _RunningStep, micro_batches: Iterator[MicroBatch], _model: Any
    ) -> tuple[torch.Tensor, Any]:
        """One micro-batch for Megatron's schedule: the losses, and a function that makes the mean
        and a report of them.
        """
        number, tokens, labels = next(micro_batches)
        device = self.mesh.device

        # the mask
        if self.step_draws:
            measured = self._share(self.step_draws, running, number)
        else:
            key = replace(running.sample.key, micro_batch=number)
            drawn = RunningSample(
                replace(running.sample, key=key), running.norm_coef, number == running.first
            )
            self.masked_model.switch.running, measured = drawn, drawn.measured

        # the forward pass, in which the linears draw and measure
        rows, targets = self.mesh.on_device(tokens), self.mesh.on_device(labels)
        losses = self.loss(self.masked_model.model, rows, targets)
        norms = [one.norm.to(device) for one in measured.values()]
        norm = self.mesh.sum_over_tp(torch.stack(norms).sum())
        if number == running.first:
            running.first_draw = measured

        def mean_and_report(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            mean = output.mean()
            objective = mean.detach().double()
            return mean, {"weight_norm": norm, "objective": objective, **losses.parts()}

        return losses.objective, mean_and_report

    def _share(
        self, step_draws: StepDraws, running: _RunningStep, number: int
    ) -> Mapping[int, Measured]:
        """Let the linears compute under the masks that serve micro-batch ``number``, which are
        drawn where it is the first of theirs on this replica; what the draw measured.

        The masks stand in no relation to the layout: their key has the number of the first
        micro-batch of the global batch that they serve, whichever replica runs it.
        """
        sampling = self.config.learn.sampling
        shared = number // sampling.span * sampling.span
        if shared == running.shared:
            return running.measured
        if running.shared is not None:  # the gradients of the masks before go to the logits
            for _ in step_draws.end():
                pass
            step_draws.drop()
        used = next(running.uses)
        running.measured = step_draws.begin(
            replace(running.sample, key=replace(running.sample.key, micro_batch=shared)),
            running.norm_coef * used,
            sums_in_fp32=used > 1 and self.config.learn.state.grads == "fp32",
            is_first=running.shared is None,
        )
        running.shared = shared
        return running.measured

    def _finalize(self, models: list[Any], *args: Any, **kwargs: Any) -> None:
        """Megatron's schedule calls this when all micro-batches are done: where micro-batches
        share masks, the gradients at the masked weights go back through the last of them; then
        replicas are reduced.
        """
        if self.step_draws:
            for number in self.step_draws.end():
                if self.replicas:
                    self.replicas.start_sum(number)
        if self.replicas:
            self.replicas.finish_sums()
        else:
            finalize_model_grads(models, *args, **kwargs)

    def _measure(self, step: int) -> dict[str, float]:
        """What the update of ``step`` was made of, in the steps that ``learn.monitor`` asks for."""
        every = self.config.learn.monitor.measure_every
        if self.optimizer.epsilon is None or every == 0 or (step + 1) % every:
            return {}
        return asdict(measure_update(self.optimizer, self.mesh))

    def _match(self) -> HiddenMatch | None:
        """The comparison of layers that ``learn.distillation.hidden`` asks for."""
        learn, model = self.config.learn, self.masked_model.model
        if learn.distillation.hidden == 0:
            return None
        # the loss is the mean over the targets of the global batch, and replicas are averaged
        targets = learn.global_batch // self.mesh.dp * self.config.data.seq_length
        return HiddenMatch(list(model.decoder.layers), learn.distillation.hidden / targets)

    def _divide(self) -> Replicas | None:
        """The division of the updates among replicas that ``learn.optimizer.distributed`` asks
        for.
        """
        if not self.config.learn.optimizer.distributed:
            return None
        if self.mesh.dp == 1:
            if self.mesh.is_main:
                log.warning("learn.optimizer.distributed has no effect: there is one replica")
            return None
        return Replicas(self.masked_model.mask_logits, self.mesh)

    def _refuse_nan(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        raise LearningError(
            f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}, not finite. "
            "Lower learn.optimizer.lr or the scale learn.sampling.kappa; start again to go on from "
            "the last snapshot."
        )
