"""The learning rate against Megatron's scheduler and sums by hand; the norm and its clipping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamask.config import Config
from megamask.config.learn_tree import LearnSection, OptimizerSection
from megamask.config.load import load_config
from megamask.errors import ConfigError
from megamask.optim.schedule import Schedule, check_schedule, gradient_norm, learning_rates
from tests.unit.optim.lean import random_grad, random_logits

ONE_RANK: Any = SimpleNamespace(sum_over_tp=lambda one: one)


WIDE = ["learn.prior.margins=true", "learn.global_batch=8"]  # 2,048 tokens
LAYERS = [*WIDE, "learn.steps=225", "learn.distillation.hidden=0.5"]


def settings(steps: int, **optimizer: Any) -> Config:
    return Config(learn=LearnSection(steps=steps, optimizer=OptimizerSection(**optimizer)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_factor(dtype: torch.dtype) -> None:
    grads = [random_grad(step, random_logits(), dtype) for step in range(3)]
    expected = torch.cat([grad.double().flatten() for grad in grads]).norm()
    norm = gradient_norm(grads, ONE_RANK)

    def factor(clip: float) -> torch.Tensor:
        chosen = settings(100, clip=clip)
        return Schedule(chosen).clip_factor(norm)

    assert float(norm) == pytest.approx(
        float(expected), rel=1e-5
    )  # fp32 sums over 5,760 squares each; bf16 sums would be off by 1e-3
    assert float(factor(0.1)) == pytest.approx(0.1 / float(expected), rel=1e-5)
    assert float(factor(1e3)) == 1.0
    assert float(factor(0.0)) == 1.0
    assert factor(0.1).dtype == torch.float32


def megatrons(config: Config, warmup: int) -> list[float]:
    """The rate of every step and of the step after the last, as Megatron's own scheduler sets
    it.
    """
    learn, (highest, last) = config.learn, learning_rates(config)
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=highest / (warmup + 1),
        max_lr=highest,
        min_lr=last,
        lr_warmup_steps=warmup,
        lr_decay_steps=learn.steps,
        lr_decay_style=learn.optimizer.schedule,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    rates = []
    for step in range(learn.steps + 1):
        scheduler.num_steps = step
        scheduler.step(increment=0)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (2, 1), (9, 0), (10, 3), (137, 136), (997, 0), (997, 211)]
)
@pytest.mark.parametrize(
    "rates", [{}, {"lr": 9e-4, "min_lr": 1e-4}, {"lr": 7e-4, "min_lr": 0.0}, {"kind": "lion"}]
)
def test_every_rate_has_the_bits_of_megatrons(
    style: str, steps: int, warmup: int, rates: dict[str, Any]
) -> None:
    config = settings(steps, schedule=style, warmup_steps=warmup, **rates)
    schedule = Schedule(config)
    assert [schedule.rate(step) for step in range(steps + 1)] == megatrons(config, warmup)


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(settings(10, lr=9e-4, min_lr=1e-4, warmup_steps=2, schedule="linear"))
    assert [schedule.rate(step) for step in (0, 1, 2, 6, 10)] == pytest.approx(
        [3e-4, 6e-4, 9e-4, 5e-4, 1e-4]
    )


@pytest.mark.parametrize(("steps", "warmup"), [(9, 0), (20, 2), (2000, 200)])
def test_a_tenth_of_the_steps_is_warm_up(steps: int, warmup: int) -> None:
    schedule = Schedule(settings(steps, lr=1e-3, schedule="constant"))
    assert [schedule.rate(step) for step in range(steps)] == pytest.approx(
        [1e-3 * min(1, (step + 1) / (warmup + 1)) for step in range(steps)]
    )


def test_a_constant_rate_has_no_last_rate() -> None:
    assert Schedule(settings(10, lr=5e-5, min_lr=1e-4, schedule="constant")).rate(9) == 5e-5


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"warmup_steps": 10}, "learn.optimizer.warmup_steps"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "learn.optimizer.min_lr"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(given: dict[str, Any], key: str) -> None:
    for check in (check_schedule, Schedule):
        with pytest.raises(ConfigError, match=key):
            check(settings(10, **given))


@pytest.mark.parametrize(
    ("given", "highest", "last"),
    [
        # 3 x 0.01 / 60 for 2,048 tokens of text and more; the root of the batch below
        ([*WIDE, "learn.steps=225"], 5e-4, 5e-5),
        ([*WIDE, "learn.steps=225", "learn.global_batch=64"], 5e-4, 5e-5),
        ([*WIDE, "learn.steps=225", "learn.global_batch=2"], 2.5e-4, 2.5e-5),
        ([*WIDE, "learn.steps=225", "learn.global_batch=1", "data.seq_length=8"], 1.25e-4, 1.25e-5),
        # the layers of the dense model tell as much with a quarter of the tokens
        ([*LAYERS, "learn.global_batch=2"], 5e-4, 5e-5),
        # half of the weight from which they count in full: 512 tokens are worth 2.5 x 512
        (
            [*LAYERS, "learn.global_batch=2", "learn.distillation.hidden=0.125"],
            5e-4 * 0.625**0.5,
            5e-5 * 0.625**0.5,
        ),
        ([*LAYERS, "learn.global_batch=2", "data.seq_length=64"], 2.5e-4, 2.5e-5),
        ([*WIDE, "learn.steps=3600"], 2.5e-4, 2.5e-5),  # 3 x 0.01 / 2 / 60
        ([*WIDE, "learn.steps=3600", "learn.global_batch=2"], 2.5e-4, 2.5e-5),  # the lower of both
        (
            ["learn.prior.margins=true", "learn.steps=225", "learn.prior.mask=null"],
            1e-2 / 30,
            1e-3 / 30,
        ),
        (["learn.steps=225"], 1e-3, 1e-4),
        (["learn.steps=900"], 5e-4, 5e-5),
        (
            ["learn.steps=900", "learn.prior.strength=6", "learn.sampling.logit_std=0.02"],
            2e-3,
            2e-4,
        ),
        (["learn.steps=25", "learn.prior.mask=null"], 1e-3, 1e-4),  # to cross one std of noise
        (["learn.steps=25", "learn.prior.strength=0"], 1e-3, 1e-4),
        (["learn.steps=225", "learn.memory=leanest"], 1e-3 / 3, 1e-4 / 3),
        (
            ["learn.preset=maskllm", "learn.steps=225", "learn.memory=leanest"],
            1e-3 / 3,
            1e-4 / 3,
        ),  # not AdamW's 5e-4
        (["learn.memory=leanest", "learn.optimizer.lr=2e-4"], 2e-4, 2e-5),
        (["learn.steps=225", "learn.optimizer.lr=2e-3"], 2e-3, 2e-4),
        (["learn.steps=225", "learn.optimizer.min_lr=0"], 1e-3, 0),
        (["learn.preset=maskllm"], 5e-4, 1e-4),
    ],
)
def test_a_rate_that_was_not_given_follows_from_steps_and_prior(
    given: list[str], highest: float, last: float
) -> None:
    given = ["learn.prior.margins=false", *given]
    assert learning_rates(load_config(None, given)) == pytest.approx((highest, last))
