"""PyTorch's fused AdamW in Megatron's FP32Optimizer, which knows how to shard its state. The clip factor enters in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from megamask.config.tree import OptimizerSection
from megamask.learn.mask_optimizer import MaskOptimizer
from megamask.parallel.linear import MaskedLinear

# What Megatron recognises the one parameter group by when it loads optimizer state.
_GROUP_NAME = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(MaskOptimizer):
    """fp32 logits, gradients and moments."""

    def __init__(self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int) -> None:
        super().__init__(section, linears, seed)
        group = {"params": self.logits, **_GROUP_NAME}
        decay = section.weight_decay
        self.adamw = torch.optim.AdamW([group], lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=decay, fused=True)
        settings = OptimizerConfig(optimizer="adam", lr=section.lr, weight_decay=decay, clip_grad=0.0, bf16=False)
        self.megatron = FP32Optimizer(self.adamw, settings, _make_state)
        self.param_groups = self.adamw.param_groups
        _make_state(self.adamw)

    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """PyTorch divides every gradient by ``grad_scale`` as it reads it."""
        self.param_groups[0]["lr"] = rate
        self.adamw.grad_scale = 1 / clip_factor.float()  # type: ignore[attr-defined]
        self.megatron.step()
        self.megatron.zero_grad()  # it made main_grad the grad: the next backward would add to it twice

    def state_tensors(self) -> list[torch.Tensor]:
        """Both moments, and the step counters."""
        return [tensor for state in self.adamw.state.values() for tensor in state.values()]

    def sharded_state_dict(self, logits: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """Megatron's own."""
        state: dict[str, Any] = self.megatron.sharded_state_dict(logits, is_loading=is_loading)
        return state

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Megatron's own."""
        self.megatron.load_state_dict(loaded)
        self.param_groups = self.adamw.param_groups

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """Mean and mean square of the gradients, fp32."""
        return {name: [self.adamw.state[logits][name] for logits in self.logits] for name in _MOMENTS}


@torch.no_grad()
def _make_state(optimizer: torch.optim.Optimizer, _settings: object = None) -> None:
    """Zero moments, so that a snapshot has somewhere to be loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
                optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
