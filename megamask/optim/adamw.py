"""AdamW (Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization"). Logits in fp32 are
updated by PyTorch's fused AdamW with fp32 moments, logits in bf16 by ``AdamWBf16``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.optim.adamw_bf16 import AdamWBf16
from megamask.optim.base import MaskOptimizer, UpdateRule

if TYPE_CHECKING:
    from megamask.parallel.masked_linear import MaskedLinear

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(MaskOptimizer):
    """PyTorch's fused AdamW. fp32 moments take 8 bytes a logit. The clip factor is applied in the
    same pass over the gradients.
    """

    def __init__(
        self,
        section: OptimizerSection,
        linears: Sequence[MaskedLinear],
        seed: int,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(section, linears, seed)
        self.epsilon = epsilon
        self.adamw = torch.optim.AdamW(
            self.logits,
            lr=0.0,
            betas=section.decays,
            eps=epsilon,
            weight_decay=section.weight_decay,
            fused=True,
        )
        for logits in self.logits:
            moments = {name: torch.zeros_like(logits, requires_grad=False) for name in _MOMENTS}
            self.adamw.state[logits] = {"step": torch.zeros((), device=logits.device), **moments}

    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """Update all logits. PyTorch divides each gradient by ``grad_scale`` when it reads it, and
        writes the quotient back.
        """
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.grad_scale = 1 / clip_factor  # type: ignore[attr-defined]
        for logits in self.logits:
            logits.grad = logits.main_grad  # type: ignore[attr-defined]
        self.adamw.step()
        # autograd would add the next gradient to logits.grad, which is main_grad, once more
        self.adamw.zero_grad()

    def state_tensors(self) -> list[torch.Tensor]:
        """Both moments, and the step counters."""
        return [tensor for state in self.adamw.state.values() for tensor in state.values()]

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """Mean and mean square of the gradients, fp32."""
        return {
            name: [self.adamw.state[logits][name] for logits in self.logits] for name in _MOMENTS
        }

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Restore the moments exactly."""
        for number, logits in enumerate(self.logits):
            state = self.adamw.state[logits]
            state["step"].fill_(steps)
            for name in _MOMENTS:
                state[name].copy_(moments[name][number])

    def steps_done(self) -> int:
        """The number of updates so far, for the bias correction."""
        return int(self.adamw.state[self.logits[0]]["step"]) if self.logits else 0


class AdamWRule(UpdateRule):
    """AdamW whose two moments have the dtype of the logits."""

    name = "adamw"
    has_epsilon = True
    has_short_means = True

    def has_kernels(self, logits_dtype: str) -> bool:
        """For bf16 logits."""
        return logits_dtype == "bf16"

    def moment_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """Two moments: 8 bytes in fp32, 4 in bf16."""
        return 8.0 if logits_dtype == "fp32" else 4.0

    def build(
        self,
        section: OptimizerSection,
        linears: Sequence[MaskedLinear],
        seed: int,
        *,
        use_kernels: bool,
        logits_dtype: str,
        epsilon: float,
    ) -> MaskOptimizer:
        """PyTorch's AdamW for fp32 logits, stochastic rounding for bf16 logits."""
        if logits_dtype == "fp32":
            return AdamW(section, linears, seed, epsilon)
        return AdamWBf16(section, linears, seed, use_kernels, epsilon)
