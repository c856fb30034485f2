"""The learning rate of the mask logits: derived from the run, warmed up and decayed by Megatron's
scheduler.
"""

from __future__ import annotations

import math

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamask.config.tree import LearnSection
from megamask.errors import ConfigError
from megamask.optim.base import MaskOptimizer

LION = ("lion", "lion8bit")


# from here on Lion destroyed a mask within a hundred steps; at a third of it few groups changed
LION_RATE = 1e-3


def check_state(learn: LearnSection) -> None:
    """Check that the optimizer can update such logits from such gradients.

    Raises:
        ConfigError: bf16 gradients of fp32 logits.
    """
    if learn.state.grads == "bf16" and learn.state.logits == "fp32":
        fix = "Use learn.state.logits=bf16 too, or learn.state.grads=fp32."
        raise ConfigError("learn.state.grads", "bf16", "fp32 while learn.state.logits=fp32", fix)


def learning_rates(learn: LearnSection) -> tuple[float, float]:
    """The highest rate and the last one.

    A group leaves the prior when its logits have crossed the prior's gap, strength x logit_std.
    AdamW's steps are about as long as the rate. Noise adds them up like the root of their number,
    evidence like their number: a rate of gap / (2 sqrt(steps)) keeps noise within half the gap in a
    run of any length, and the longer the run, the weaker the evidence that crosses it.
    """
    section = learn.optimizer
    gap = learn.sampling.logit_std * max(
        learn.prior.strength if learn.prior.mask else 0.0, 1.0
    )  # without a prior, noise is what to cross
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
        raise ConfigError(
            "learn.optimizer.warmup_steps",
            warmup,
            f"below learn.steps, here {learn.steps}",
            "Lower it.",
        )
    if last > highest:
        raise ConfigError(
            "learn.optimizer.min_lr",
            last,
            f"at most learn.optimizer.lr, here {highest:g}",
            "Lower it.",
        )


def build_scheduler(learn: LearnSection, optimizer: MaskOptimizer) -> OptimizerParamScheduler:
    """Megatron's warm-up and decay of the learning rate; weight decay stays constant. Raises as
    ``check_schedule``.

    The rate of step s is lr (s + 1) / (warm-up + 1) in the warm-up, so that no step is made with a
    rate of 0.
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
