"""The learning rate and the gradient clipping of each step.

The highest rate is derived from the run. It is reached by a warm-up and then falls in one of three
shapes, in the same numbers as Megatron's OptimizerParamScheduler gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.optim.optimizers import find_rule

if TYPE_CHECKING:
    from megamask.optim.zero1 import Replicas
    from megamask.parallel.mesh import Mesh

GRADED_STEPS = 60  # that cross the gap at the highest rate, where weights start at their margins
# Tokens of text in a step whose gradient bears this rate. With the layers of the dense model, at
# this weight or more, a token is worth so many (docs/log.md, "a rate that follows the batch").
FULL_BATCH = 2048
LAYERS_WORTH, LAYERS_WEIGHT = 4.0, 0.25
LEAST_SHARE = 0.25  # of the rate, for smaller batches than were tried

# The share of the fall from the highest to the last rate that is still to come, by progress in
# [0, 1] since the warm-up.
FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (math.cos(math.pi * progress) + 1.0),
    "linear": lambda progress: 1.0 - progress,
}


class Schedule:
    """The learning rates of a run, and its clipping of gradients.

    Attributes:
        highest: the rate at the end of the warm-up.
        last: the rate at the end of the run.
        warmup: number of steps in which the rate rises.

    Raises:
        ConfigError: as ``check_schedule``.
    """

    def __init__(self, config: Config) -> None:
        check_schedule(config)
        learn, section = config.learn, config.learn.optimizer
        self.highest, self.last = learning_rates(config)
        self.warmup = learn.steps // 10 if section.warmup_steps is None else section.warmup_steps
        self.steps, self.clip = learn.steps, section.clip
        self._fall = None if section.schedule == "constant" else FALLS[section.schedule]

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` (counted from 0).

        In the warm-up it is highest (step + 1) / (warm-up + 1), so that no step has a rate of 0.
        """
        if 0 < self.warmup >= step:
            first = self.highest / (self.warmup + 1)
            return first + (self.highest - first) * step / self.warmup
        if self._fall is None:
            return self.highest
        progress = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.last + self._fall(progress) * (self.highest - self.last)

    def clip_factor(self, norm: torch.Tensor) -> torch.Tensor:
        """The factor, 0-d fp32, that makes gradients of norm ``norm`` no longer than
        ``learn.optimizer.clip``. A clip of 0 means no limit.
        """
        if self.clip > 0:
            return (self.clip / norm.clamp(min=self.clip)).float()
        return torch.ones_like(norm, dtype=torch.float32)


@torch.no_grad()
def gradient_norm(
    grads: Sequence[torch.Tensor], mesh: Mesh, replicas: Replicas | None = None
) -> torch.Tensor:
    """The norm of all gradients of the model, 0-d fp64.

    Args:
        grads: the gradients of this rank, or of the part of them that this replica updates.
        mesh: the ranks, over whose shards the squares are summed.
        replicas: the division among replicas, if there is one.
    """
    norms = torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32))
    squares = norms.double().square()
    return mesh.sum_over_tp((replicas.from_all(squares) if replicas else squares).sum()).sqrt()


def learning_rates(config: Config) -> tuple[float, float]:
    """The highest rate and the last rate.

    A group leaves the prior when its logits have crossed the gap of the prior, strength x
    logit_std. A step of AdamW is about as long as the rate. The steps of noise add up to the root
    of their number, the steps of evidence to their number. A rate of gap / (2 sqrt(steps)) keeps
    noise within half the gap in a run of any length, and the longer the run, the weaker the
    evidence that crosses the gap. Where each weight starts at its margin, most groups that should
    leave the prior have a small gap, and a short run does better at a lower rate, which did not
    depend on its length: gap / ``GRADED_STEPS``, times ``batch_share``. Other rules divide the rate
    by their ``rate_divisor``.
    """
    learn = config.learn
    section, rule = learn.optimizer, find_rule(learn.optimizer.kind)
    # without a prior, the gap to cross is one std of the initial logits
    strength = max(learn.prior.strength if learn.prior.mask else 0.0, 1.0)
    gap = learn.sampling.logit_std * strength
    is_graded = learn.prior.mask is not None and learn.prior.margins
    crossing = max(2 * math.sqrt(learn.steps), GRADED_STEPS / batch_share(config) * is_graded)
    derived = gap / crossing / rule.rate_divisor
    highest = derived if section.lr is None else section.lr
    return highest, highest / 10 if section.min_lr is None else section.min_lr


def batch_share(config: Config) -> float:
    """The share of the rate that a step's gradient bears, in [``LEAST_SHARE``, 1].

    A clipped gradient has a fixed length, and in a small batch nearly all of it is noise. Steps of
    noise spoil like their square, and steps of evidence gain in proportion, as the root of the
    share of the squared gradient that is signal. So the best rate is proportional to that root, and
    the share to the number of tokens, as long as it is small.
    """
    learn = config.learn
    weight = min(1.0, learn.distillation.hidden / LAYERS_WEIGHT)
    worth = 1 + (LAYERS_WORTH - 1) * weight
    share = math.sqrt(worth * learn.global_batch * config.data.seq_length / FULL_BATCH)
    return min(1.0, max(LEAST_SHARE, share))


def check_schedule(config: Config) -> None:
    """Check that the learning rate can rise over the warm-up and then fall.

    Raises:
        ConfigError: the warm-up is not shorter than the run, or the rate would rise.
    """
    learn, (highest, last) = config.learn, learning_rates(config)
    warmup = learn.optimizer.warmup_steps
    if warmup is not None and warmup >= learn.steps:
        allowed = f"below learn.steps, here {learn.steps}"
        raise ConfigError("learn.optimizer.warmup_steps", warmup, allowed, "Lower it.")
    if last > highest and learn.optimizer.schedule != "constant":
        allowed = f"at most learn.optimizer.lr, here {highest:g}"
        raise ConfigError("learn.optimizer.min_lr", last, allowed, "Lower it.")
