"""AdamW on the mask logits behind Megatron's optimizer and scheduler, and the gradient norm over all shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamask.config.tree import OptimizerSection
from megamask.errors import ConfigError
from megamask.parallel.mesh import Mesh

# What Megatron recognises the one parameter group by when it loads optimizer state.
_GROUP_NAME = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


def build_optimizer(section: OptimizerSection, logits: Sequence[torch.nn.Parameter]) -> FP32Optimizer:
    """PyTorch's fused AdamW in Megatron's FP32Optimizer, which knows how to shard its state. Clipping is done by the step."""
    group = {"params": list(logits), **_GROUP_NAME}
    adamw = torch.optim.AdamW([group], lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay, fused=True)
    settings = OptimizerConfig(optimizer="adam", lr=section.lr, weight_decay=section.weight_decay, clip_grad=0.0, bf16=False)
    return FP32Optimizer(adamw, settings, _make_state)


@torch.no_grad()
def _make_state(optimizer: torch.optim.Optimizer, _settings: object = None) -> None:
    """Zero moments, so that a snapshot has somewhere to be loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


def check_schedule(section: OptimizerSection, steps: int) -> None:
    """Check that the learning rate can rise over the warm-up and then fall.

    Raises:
        ConfigError: the warm-up is not shorter than the run, or the rate would rise.
    """
    if section.warmup_steps >= steps:
        raise ConfigError("learn.optimizer.warmup_steps", section.warmup_steps, f"below learn.steps, here {steps}", "Lower it.")
    if section.min_lr > section.lr:
        raise ConfigError("learn.optimizer.min_lr", section.min_lr, f"at most learn.optimizer.lr, here {section.lr}", "Lower it.")


def build_scheduler(section: OptimizerSection, steps: int, optimizer: FP32Optimizer) -> OptimizerParamScheduler:
    """Megatron's warm-up and decay of the learning rate; weight decay stays constant. Raises as ``check_schedule``."""
    check_schedule(section, steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=steps,
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
def clip_gradients(grads: Sequence[torch.Tensor], largest: float, mesh: Mesh) -> torch.Tensor:
    """Scale ``grads`` in place to a norm of at most ``largest`` (0: leave them) and return the norm over all shards, 0-d."""
    squares = torch.stack(torch._foreach_norm(list(grads))).double().square().sum()
    norm = mesh.sum_over_tp(squares).sqrt()
    if largest > 0:
        torch._foreach_mul_(list(grads), (largest / norm.clamp(min=largest)).float())
    return norm
