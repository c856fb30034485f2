"""AdamW (Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization", Alg. 2) for bf16
logits, with bf16 moments.

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay p)

The logits p are updated from the moments in fp32, before the moments are rounded. Logits and
moments are then rounded stochastically (see stochastic_rounding.py).

Shapes: O rows, C logits of a group, G groups per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.optim.stochastic_rounding import RoundingOptimizer, noise_words, store
from megamask.sparsity.noise import NoiseKey

if TYPE_CHECKING:
    from megamask.parallel.masked_linear import MaskedLinear


def adamw_update(
    logits: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    ids_OG: torch.Tensor,
    key: NoiseKey,
    numbers: torch.Tensor,
) -> None:
    """Update ``logits``, ``mean`` and ``square`` (O, C, G) in place. This is the reference of the
    kernels.
    """
    rate, decay, beta1, rest1, beta2, rest2, root, eps, clip = numbers.unbind()
    noise = noise_words(key, ids_OG, logits.shape[1])
    slope, value = grad.float() * clip, logits.float()
    m = beta1 * mean.float() + rest1 * slope
    v = beta2 * square.float() + rest2 * (slope * slope)
    store(logits, value - (rate * (m / (_root(v) * root + eps)) + decay * value), noise & 0xFFFF)
    store(mean, m, noise >> 16)
    store(square, v, (noise ^ (noise >> 16)) & 0xFFFF)


def _root(value: torch.Tensor) -> torch.Tensor:
    """The fp32 number that is nearest to the square root. PyTorch's root of fp32 on CPUs is off by
    one bit in 0.6 % of all cases.
    """
    return value.double().sqrt().float() if value.device.type == "cpu" else value.sqrt()


class AdamWBf16(RoundingOptimizer):
    """AdamW with 4 bytes of moments a logit. Its mean over the roundings is fp32 AdamW's update."""

    names, update = ("exp_avg", "exp_avg_sq"), staticmethod(adamw_update)

    def __init__(
        self,
        section: OptimizerSection,
        linears: Sequence[MaskedLinear],
        seed: int,
        use_kernels: bool,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(section, linears, seed, use_kernels)
        self.epsilon: float = epsilon
        self.updates = 0

    @staticmethod
    def kernel() -> Callable[..., Any]:
        """``adamw_update`` in one pass on the CPU."""
        from megamask.optim.stochastic_rounding_numba import adamw

        return adamw

    @staticmethod
    def cuda_kernel() -> Any:
        """``adamw_update`` in one pass on CUDA."""
        from megamask.optim.stochastic_rounding_triton import adamw

        return adamw

    def numbers(self, rate: float) -> list[float]:
        """rate / (1 - beta1^t), rate decay, beta1, 1 - beta1, beta2, 1 - beta2,
        1 / sqrt(1 - beta2^t), eps.
        """
        one, two = self.section.decays
        return [
            rate / (1 - one**self.updates),
            rate * self.section.weight_decay,
            one,
            1 - one,
            two,
            1 - two,
            (1 - two**self.updates) ** -0.5,
            self.epsilon,
        ]

    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """Count the update, and update all logits."""
        self.updates += 1
        super().step(step, rate, clip_factor)

    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Restore the moments exactly, and the count of updates."""
        super().load_moments(moments, steps)
        self.updates = steps

    def steps_done(self) -> int:
        """The number of updates so far, for the bias correction."""
        return self.updates
