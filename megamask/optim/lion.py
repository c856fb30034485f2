"""Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", Alg. 2) with bf16
momentum.

    u = sign(beta1 m + (1 - beta1) g)
    p <- p - lr (u + decay p)
    m <- beta2 m + (1 - beta2) g

All of it is computed in fp32 and then rounded stochastically (see stochastic_rounding.py): at
beta2 = 0.99 a step moves m by about 1 % of its size, which rounding to nearest would mostly lose.

Shapes: O rows, C logits of a group, G groups per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.optim.base import MaskOptimizer, UpdateRule
from megamask.optim.stochastic_rounding import RoundingOptimizer, noise_words, store
from megamask.sparsity.noise import NoiseKey

if TYPE_CHECKING:
    from megamask.parallel.masked_linear import MaskedLinear


def lion_update(
    logits: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    ids_OG: torch.Tensor,
    key: NoiseKey,
    numbers: torch.Tensor,
) -> None:
    """Update ``logits`` and bf16 ``momentum`` (O, C, G) in place. This is the reference of the
    kernels.
    """
    noise = noise_words(key, ids_OG, logits.shape[1])
    fresh = move_logits(logits, grad, momentum.float(), numbers, noise)
    store(momentum, fresh, noise >> 16)


def move_logits(
    logits: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    numbers: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Update ``logits`` in place from fp32 ``momentum`` and return the new momentum, fp32."""
    rate, decay, beta1, rest1, beta2, rest2, clip = numbers.unbind()
    slope, value = grad.float() * clip, logits.float()
    direction = (beta1 * momentum + rest1 * slope).sign()
    value = value - rate * (direction + decay * value)
    store(logits, value, noise & 0xFFFF)
    return beta2 * momentum + rest2 * slope


class Lion(RoundingOptimizer):
    """Lion with bf16 momentum, 2 bytes a logit."""

    update: ClassVar[Callable[..., None]] = staticmethod(lion_update)
    names = ("momentum",)

    @staticmethod
    def kernel() -> Callable[..., Any]:
        """``lion_update`` in one pass on the CPU."""
        from megamask.optim.stochastic_rounding_numba import lion

        return lion

    @staticmethod
    def cuda_kernel() -> Any:
        """``lion_update`` in one pass on CUDA."""
        from megamask.optim.stochastic_rounding_triton import lion

        return lion

    def numbers(self, rate: float) -> list[float]:
        """rate, decay, beta1, 1 - beta1, beta2, 1 - beta2."""
        one, two = self.section.decays
        return [rate, self.section.weight_decay, one, 1 - one, two, 1 - two]


class LionRule(UpdateRule):
    """Lion with one bf16 moment.

    A step moves every logit by the full rate, whatever its gradient. At rates of 1e-3 and more Lion
    destroyed a mask within a hundred steps; at a third of that rate few groups changed.
    """

    name = "lion"
    rate_divisor = 3.0
    warning_rate = 1e-3
    second_decay = 0.99  # the paper's
    rate_advice = (
        "Lion moves every logit by the full rate: use about a third of AdamW's learning rate"
    )

    def has_kernels(self, logits_dtype: str) -> bool:
        """For logits of either dtype."""
        return True

    def moment_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """One moment in bf16."""
        return 2.0

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
        """Lion, for logits of either dtype."""
        return Lion(section, linears, seed, use_kernels)
