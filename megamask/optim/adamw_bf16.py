"""AdamW (Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization", Alg. 2) with bf16
logits and moments.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay p)

The logits move by the moments before these are rounded; all three are rounded stochastically (see
stochastic_rounding.py).
"""

from __future__ import annotations

import torch

from megamask.optim.stochastic_rounding import RoundingOptimizer, store, words


def adamw_update(
    logits: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    ids_OG: torch.Tensor,
    key: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    """Update ``logits``, ``mean`` and ``square`` (O, C, G) in place: the plain reference, and what
    runs on other devices than CPUs.
    """
    rate, decay, beta1, rest1, beta2, rest2, root, eps, clip = numbers.unbind()
    noise = words(key, ids_OG, logits.shape[1])
    slope, value = grad.float() * clip, logits.float()
    m = beta1 * mean.float() + rest1 * slope
    v = beta2 * square.float() + rest2 * (slope * slope)
    store(logits, value - (rate * (m / (_root(v) * root + eps)) + decay * value), noise & 0xFFFF)
    store(mean, m, noise >> 16)
    store(square, v, (noise ^ (noise >> 16)) & 0xFFFF)


def _root(value: torch.Tensor) -> torch.Tensor:
    """The nearest fp32. PyTorch's own root of fp32 on CPUs is one bit off in 0.6 % of all cases."""
    return value.double().sqrt().float() if value.device.type == "cpu" else value.sqrt()


class AdamWBf16(RoundingOptimizer):
    """4 bytes of moments a logit. On average over the roundings it does what fp32 AdamW does."""

    names, update, kernel = ("exp_avg", "exp_avg_sq"), staticmethod(adamw_update), "adamw"
    updates = 0

    def numbers(self, rate: float) -> list[float]:
        """Rate / (1 - beta1^t), rate * decay, beta1, 1 - beta1, beta2, 1 - beta2, 1 / sqrt(1 -
        beta2^t), eps.
        """
        one, two = self.section.betas
        fixed = [one, 1 - one, two, 1 - two]
        return [
            rate / (1 - one**self.updates),
            rate * self.section.weight_decay,
            *fixed,
            (1 - two**self.updates) ** -0.5,
            self.section.eps,
        ]

    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """One update of every logit."""
        self.updates += 1
        super().step(step, rate, clip_factor)

    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Exact."""
        super().load_moments(moments, steps)
        self.updates = steps

    def steps_done(self) -> int:
        """Updates so far, for the bias correction."""
        return self.updates
