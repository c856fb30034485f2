"""Recovery by training on the text of the run: all kept weights, or a low-rank change of them.

The samples, their order, micro-batches and replicas are those of ``learn`` (``BatchPlan``), and so
is the loss, with the dense model as a teacher where that is asked for. Each micro-batch multiplies
by the weights of ``trained_weights.py``, so the zeros hold in every pass.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from megamask.config import Config
from megamask.config.learn_tree import DistillationSection
from megamask.data.batches import BatchPlan, check_batch
from megamask.data.blend import blend_weights, train_dataset
from megamask.errors import LearningError
from megamask.model.objective import loss_of
from megamask.parallel.mask_context import MaskSwitch
from megamask.parallel.masked_linear import MaskedLinear
from megamask.prepare.content import Content
from megamask.prepare.run_inputs import RunInputs
from megamask.recovery.recovery import Recovered, Recovery, RecoveryJob, kept_weights
from megamask.recovery.trained_weights import KeptWeights, LowRank, TrainedWeight
from megamask.sparsity.noise import parameter_ids
from megamask.terminal import is_reported

log = logging.getLogger(__name__)
BETAS, EPSILON, CLIP = (0.9, 0.95), 1e-8, 1.0  # of Adam; the longest gradient
WARMUP, LAST = 0.1, 0.1  # share of the steps; the last rate as a share of the highest
STATE = "training"  # the part of the unfinished work


class Training(Recovery):
    """Adam on the parameters of every masked linear.

    Attributes:
        rate: the highest rate where ``recover.rate`` is null.
    """

    reads: tuple[str, ...] = ("steps", "global_batch", "rate", "distillation")
    rate: float

    @abstractmethod
    def trained(
        self, config: Config, linear: MaskedLinear, mask_OI: torch.Tensor, number: int
    ) -> TrainedWeight:
        """The weight of a linear with its parameters.

        Args:
            config: the settings.
            linear: the frozen linear.
            mask_OI: this rank's shard of its mask.
            number: of the linear, the same in every layout.
        """

    def check_early(self, inputs: RunInputs) -> None:
        """Refuse a global batch that cannot be dealt out.

        Raises:
            ConfigError: naming the nearest that can.
        """
        section = inputs.config.recover
        check_batch(section.global_batch, section.micro_batch, inputs.layout.dp, "recover")

    def lengths(self) -> tuple[str, ...]:
        """Those of the samples of learning."""
        return ("data.seq_length",)

    def text(self, config: Config) -> dict[str, Any]:
        """The training text, how its domains are blended, the length of a sample and the seed of
        their order. The order of the domains decides ties of the blend.
        """
        weights = blend_weights(config)
        described: dict[str, Any] = {
            "text_sha256": Content.of(config, None, None).text,
            "blend": weights,
            "seq_length": config.data.seq_length,
            "seed": config.seed,
        }
        if list(weights) != sorted(weights):  # results of before do not name their order
            described["order"] = list(weights)
        return described

    def recover(self, job: RecoveryJob) -> Recovered:
        """``measured`` has the loss of the first and of the last step on the text."""
        section = job.config.recover
        count, length = section.steps * section.global_batch, job.config.data.seq_length
        with torch.enable_grad():
            return train(self, job, train_dataset(job.config, count, length, job.config.seed))


class Finetune(Training):
    """All kept weights are trained."""

    rate = 1e-4

    def trained(
        self, config: Config, linear: MaskedLinear, mask_OI: torch.Tensor, number: int
    ) -> TrainedWeight:
        """The kept weights."""
        return KeptWeights(linear, mask_OI)


class Lora(Training):
    """A low-rank change of the kept weights is trained, and merged under the mask."""

    reads = (*Training.reads, "rank", "alpha")
    rate = 1e-3

    def trained(
        self, config: Config, linear: MaskedLinear, mask_OI: torch.Tensor, number: int
    ) -> TrainedWeight:
        """The frozen weights with the change."""
        section = config.recover
        seed = zlib.crc32(f"{config.seed} {number}".encode())  # PyTorch takes 32 bits
        return LowRank(linear, mask_OI, section.rank, section.alpha / section.rank, seed)


def train(method: Training, job: RecoveryJob, samples: Any) -> Recovered:
    """Train, and merge. A killed run goes on from its last snapshot, with the same bits on a CPU.

    Args:
        method: has the parameters.
        job: the model and the masks.
        samples: of the run by number, equal on all ranks.

    Raises:
        LearningError: the loss or the gradient is not finite.
    """
    config, mesh, section = job.config, job.mesh, job.config.recover
    ids, switch = parameter_ids(job.linears), MaskSwitch()
    trained = {
        name: method.trained(config, linear, job.masks_OI[name], ids[name])
        for name, linear in job.linears.items()
    }
    for linear in job.linears.values():
        linear.switch = switch  # turns the masks off for the teacher
    plan = BatchPlan(samples, section.global_batch, section.micro_batch, mesh.dp, mesh.dp_rank)
    loss = loss_of(DistillationSection(share=section.distillation), switch)
    parameters = [one for weight in trained.values() for one in weight.parameters]
    optimizer = torch.optim.Adam(parameters, lr=1.0, betas=BETAS, eps=EPSILON, foreach=False)
    losses, begin = _resume(job, parameters, optimizer), time.perf_counter()
    job.model.train()
    try:
        for step in range(len(losses), section.steps):
            rate = (section.rate or method.rate) * share_of_rate(step, section.steps)
            losses.append(
                _step(job, trained, optimizer, plan, partial(loss, job.model), step, rate)
            )
            done = step + 1
            if mesh.is_main and is_reported(done, section.steps):
                took = time.perf_counter() - begin
                log.info("  step %d/%d  loss %.4f  %.1f s", done, section.steps, losses[-1], took)
            if done % section.snapshot_every == 0 and done < section.steps:
                _save(job, parameters, optimizer, losses)
    finally:
        job.model.eval()
        for linear in job.linears.values():
            linear.step_weight = linear.switch = None
    found = Recovered(measured={"loss": [round(one, 6) for one in (losses[0], losses[-1])]})
    for name, weight in trained.items():
        new_OI = kept_weights(weight.weight(), job.masks_OI[name], job.dtype)
        found.weights_OI[name] = new_OI.cpu().contiguous()
    return found


def _step(
    job: RecoveryJob,
    trained: Mapping[str, TrainedWeight],
    optimizer: torch.optim.Adam,
    plan: BatchPlan,
    loss: Any,
    step: int,
    rate: float,
) -> float:
    """Learn from the global batch of ``step``; returns its mean loss on the text."""
    mesh = job.mesh
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for _, tokens_BS, labels_BS in plan.micro_batches(step):
        for name, weight in trained.items():
            linear = job.linears[name]
            linear.step_weight = weight.weight().to(linear.weight.dtype)
        losses = loss(mesh.on_device(tokens_BS), mesh.on_device(labels_BS))
        (losses.objective.mean() / plan.accumulations).backward()
        total += losses.lm.detach().mean(dtype=torch.float64) / plan.accumulations
    mean = float(mesh.mean_over_dp(total))
    squares = torch.stack([weight.reduce_gradients(mesh) for weight in trained.values()])
    norm = float(mesh.sum_over_tp(squares.sum()).sqrt())
    if not math.isfinite(mean) or not math.isfinite(norm):
        raise LearningError(
            f"step {step + 1}: the loss is {mean} and the gradient norm {norm}, not finite. "
            "Lower recover.rate: training starts anew then, because snapshots are of one rate."
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad.mul_(CLIP / max(CLIP, norm))
    optimizer.step()
    return mean


def share_of_rate(step: int, steps: int) -> float:
    """The rate of a step as a share of the highest: a linear rise, then half a cosine."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * progress)) / 2


def _save(
    job: RecoveryJob,
    parameters: list[torch.Tensor],
    optimizer: torch.optim.Adam,
    losses: list[float],
) -> None:
    """Keep parameters and moments of the steps so far."""
    tensors: dict[str, torch.Tensor] = {}
    for number, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        tensors[f"{number}"] = parameter.detach()
        tensors[f"{number} first"], tensors[f"{number} second"] = (
            state["exp_avg"],
            state["exp_avg_sq"],
        )
    job.unfinished.save_step(STATE, len(losses), tensors, losses)


@torch.no_grad()
def _resume(
    job: RecoveryJob, parameters: list[torch.Tensor], optimizer: torch.optim.Adam
) -> list[float]:
    """Go on from the last snapshot; returns the losses of the steps that are done."""
    kept = job.unfinished.load_newest(STATE)
    if kept is None:
        return []
    tensors, losses = kept
    for number, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"{number}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(len(losses))),
            "exp_avg": tensors[f"{number} first"].to(parameter),
            "exp_avg_sq": tensors[f"{number} second"].to(parameter),
        }
    if job.mesh.is_main:
        log.info("  goes on after step %d", len(losses))
    return list(losses)
