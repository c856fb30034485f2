"""PyTorch's fused AdamW for fp32 logits, with fp32 gradients and moments. The clip factor enters in
the same pass over the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megamask.config.tree import OptimizerSection
from megamask.optim.base import MaskOptimizer
from megamask.parallel.masked_linear import MaskedLinear

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(MaskOptimizer):
    """8 bytes of moments a logit."""

    def __init__(
        self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int
    ) -> None:
        super().__init__(section, linears, seed)
        self.adamw = torch.optim.AdamW(
            self.logits,
            lr=0.0,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
        for logits in self.logits:
            moments = {name: torch.zeros_like(logits, requires_grad=False) for name in _MOMENTS}
            self.adamw.state[logits] = {"step": torch.zeros((), device=logits.device), **moments}

    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """PyTorch divides every gradient by ``grad_scale`` as it reads it, and writes it back."""
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.grad_scale = 1 / clip_factor  # type: ignore[attr-defined]
        for logits in self.logits:
            logits.grad = logits.main_grad  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad()  # or the next backward would add to main_grad twice

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
        """Exact."""
        for number, logits in enumerate(self.logits):
            state = self.adamw.state[logits]
            state["step"].fill_(steps)
            for name in _MOMENTS:
                state[name].copy_(moments[name][number])

    def steps_done(self) -> int:
        """Updates so far, for the bias correction."""
        return int(self.adamw.state[self.logits[0]]["step"]) if self.logits else 0
