"""From the settings to an optimizer of the mask logits, Megatron's schedule of its rate, and the gradient norm over all shards."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamask.config import Config
from megamask.config.tree import LearnSection, OptimizerSection
from megamask.errors import ConfigError
from megamask.learn import eight_bit
from megamask.learn.adamw import AdamW
from megamask.learn.adamw_bf16 import AdamWBf16
from megamask.learn.keyed import KeyedOptimizer
from megamask.learn.lion import Lion, Lion8bit
from megamask.learn.mask_optimizer import MaskOptimizer
from megamask.learn.replicas import Replicas
from megamask.parallel.linear import MaskedLinear
from megamask.parallel.mesh import Mesh

log = logging.getLogger(__name__)
LION = ("lion", "lion8bit")
LION_RATE = 1e-3  # from here on Lion destroyed a mask within a hundred steps; at a third of it few groups changed


KEYED: dict[str, type[KeyedOptimizer]] = {"adamw": AdamWBf16, "lion": Lion, "lion8bit": Lion8bit}


def check_optimizer(config: Config) -> None:
    """Everything about optimizer and state that can be refused before the model is loaded. Warns of a rate that is too high for Lion.

    Raises:
        ConfigError: a combination that does not exist, a missing package or compiler, a schedule that cannot work.
    """
    _refuse(config)
    kind, highest = config.learn.optimizer.kind, learning_rates(config.learn)[0]
    if kind in LION and highest >= LION_RATE:
        advice = "Lion moves every logit by the full rate: use about a third of AdamW's learning rate"
        log.warning("learn.optimizer.lr=%g with kind=%s: %s", highest, kind, advice)


def _refuse(config: Config) -> None:
    learn = config.learn
    check_schedule(learn)
    check_state(learn)
    if learn.optimizer.kind == eight_bit.NAME:
        is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        eight_bit.check_available("cuda" if is_cuda else "cpu")


def check_state(learn: LearnSection) -> None:
    """Check that the optimizer can update such logits from such gradients.

    Raises:
        ConfigError: bf16 gradients of fp32 logits.
    """
    if learn.state.grads == "bf16" and learn.state.logits == "fp32":
        fix = "Use learn.state.logits=bf16 too, or learn.state.grads=fp32."
        raise ConfigError("learn.state.grads", "bf16", "fp32 while learn.state.logits=fp32", fix)


def build_optimizer(config: Config, linears: Sequence[MaskedLinear], replicas: Replicas | None = None) -> MaskOptimizer:
    """The optimizer ``learn.optimizer.kind`` of the logits of ``linears``, of those alone that ``replicas`` leaves to this one.

    Raises:
        ConfigError: as ``check_optimizer``.
    """
    _refuse(config)
    logits = config.parallel.tp * sum(linear.mask_logits.numel() for linear in linears if linear.mask_logits is not None)
    section = config.learn.optimizer.model_copy(update={"eps": epsilon(config.learn.optimizer, logits)})
    optimizer = _build(section, config, [linears[number] for number in replicas.mine] if replicas else linears)
    optimizer.is_sole_owner = replicas is not None
    return optimizer


def epsilon(section: OptimizerSection, logits: int) -> float:
    """What AdamW adds to the root of its second moment.

    Without it every logit moves by about the rate, whatever its gradient, so that noise flips as many groups as evidence does, of which
    there is most where gradients are large. A gradient of norm ``clip`` has the root mean square clip / sqrt(logits).
    """
    return section.eps + section.eps_rms * section.clip / math.sqrt(logits)


def _build(section: OptimizerSection, config: Config, linears: Sequence[MaskedLinear]) -> MaskOptimizer:
    if section.kind == "adamw" and config.learn.state.logits == "fp32":
        return AdamW(section, linears, config.seed)
    if section.kind == "adamw8bit":
        return eight_bit.AdamW8bit(section, linears, config.seed)
    on_cpu = all(linear.weight.device.type == "cpu" for linear in linears)
    use_numba = on_cpu and config.learn.sampling.backend != "torch" and importlib.util.find_spec("numba") is not None
    return KEYED[section.kind](section, linears, config.seed, use_numba)


def learning_rates(learn: LearnSection) -> tuple[float, float]:
    """The highest rate and the last one.

    A group leaves the prior when its logits have crossed the prior's gap, strength x logit_std. AdamW's steps are about as long as the
    rate. Noise adds them up like the root of their number, evidence like their number: a rate of gap / (2 sqrt(steps)) keeps noise within
    half the gap in a run of any length, and the longer the run, the weaker the evidence that crosses it.
    """
    section = learn.optimizer
    gap = learn.sampling.logit_std * max(learn.prior.strength if learn.prior.mask else 0.0, 1.0)  # without a prior, noise is what to cross
    derived = gap / (2 * math.sqrt(learn.steps)) / (3 if section.kind in LION else 1)
    highest = derived if section.lr is None else section.lr
    return highest, highest / 10 if section.min_lr is None else section.min_lr


def check_schedule(learn: LearnSection) -> None:
    """Check that the learning rate can rise over the warm-up and then fall.

    Raises:
        ConfigError: the warm-up is not shorter than the run, or the rate would rise.
    """
    warmup, (highest, last) = learn.optimizer.warmup_steps, learning_rates(learn)
    if warmup is not None and warmup >= learn.steps:
        raise ConfigError("learn.optimizer.warmup_steps", warmup, f"below learn.steps, here {learn.steps}", "Lower it.")
    if last > highest:
        raise ConfigError("learn.optimizer.min_lr", last, f"at most learn.optimizer.lr, here {highest:g}", "Lower it.")


def build_scheduler(learn: LearnSection, optimizer: MaskOptimizer) -> OptimizerParamScheduler:
    """Megatron's warm-up and decay of the learning rate; weight decay stays constant. Raises as ``check_schedule``.

    The rate of step s is lr (s + 1) / (warm-up + 1) in the warm-up, so that no step is made with a rate of 0.
    """
    check_schedule(learn)
    section, (highest, last) = learn.optimizer, learning_rates(learn)
    warmup = learn.steps // 10 if section.warmup_steps is None else section.warmup_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=highest / (warmup + 1),
        max_lr=highest,
        min_lr=last,
        lr_warmup_steps=warmup,
        lr_decay_steps=learn.steps,
        lr_decay_style=section.schedule,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def set_learning_rate(scheduler: OptimizerParamScheduler, step: int) -> float:
    """Put the rate of ``step`` (counted from 0) into the optimizer and return it."""
    scheduler.num_steps = step
    scheduler.step(increment=0)
    rate: float = scheduler.optimizer.param_groups[0]["lr"]
    return rate


@torch.no_grad()
def gradient_norm(grads: Sequence[torch.Tensor], mesh: Mesh, replicas: Replicas | None = None) -> torch.Tensor:
    """The norm over all shards, 0-d fp64. ``grads`` are all of this rank, or those that ``replicas`` leaves to it."""
    squares = torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32)).double().square()
    return mesh.sum_over_tp((replicas.from_all(squares) if replicas else squares).sum()).sqrt()


def clip_factor(norm: torch.Tensor, largest: float) -> torch.Tensor:
    """What the gradients are multiplied by so that their norm is at most ``largest`` (0: any), 0-d fp32."""
    return (largest / norm.clamp(min=largest)).float() if largest > 0 else torch.ones_like(norm, dtype=torch.float32)
