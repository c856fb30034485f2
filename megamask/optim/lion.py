"""Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", Alg. 2) with 16-bit or
8-bit momentum.

    u = sign(beta1 m + (1 - beta1) g);  p <- p - lr (u + decay p);  m <- beta2 m + (1 - beta2) g

Computed in fp32, then rounded stochastically (see stochastic_rounding.py): at beta2 = 0.99 a step
moves m by about 1 % of its size.

Shapes: O rows, C candidates, G groups per row, B blocks per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from megamask.optim.stochastic_rounding import RoundingOptimizer, store, words

# groups; with all their candidates they share one scale. Small, so that shards of any usual size
# hold whole blocks
BLOCK = 8


def lion_update(
    logits: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    ids_OG: torch.Tensor,
    key: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    """Update ``logits`` and bf16 ``momentum`` (O, C, G) in place: the plain reference, and what
    runs on other devices than CPUs.
    """
    noise = words(key, ids_OG, logits.shape[1])
    fresh = _move(logits, grad, momentum.float(), numbers, noise)
    store(momentum, fresh, noise >> 16)


def lion8bit_update(
    logits: torch.Tensor,
    grad: torch.Tensor,
    codes: torch.Tensor,
    exponents: torch.Tensor,
    ids_OG: torch.Tensor,
    key: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    """As ``lion_update``, with momentum = codes (O, C, G) int8 * 2^(exponents (O, B) uint8 -
    127).
    """
    noise = words(key, ids_OG, logits.shape[1])
    fresh = _move(logits, grad, dequantize(codes, exponents), numbers, noise)
    exponents.copy_(_exponents(fresh))
    steps = fresh * _power(254 - _by_group(exponents, fresh.shape[2]))
    codes.copy_((steps + ((noise >> 16) + 0.5) * 2.0**-16).floor())


def _move(
    logits: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    numbers: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Update ``logits`` in place and return the new momentum, fp32."""
    rate, decay, beta1, rest1, beta2, rest2, clip = numbers.unbind()
    slope, value = grad.float() * clip, logits.float()
    direction = (beta1 * momentum + rest1 * slope).sign()
    value = value - rate * (direction + decay * value)
    store(logits, value, noise & 0xFFFF)
    return beta2 * momentum + rest2 * slope


class Lion(RoundingOptimizer):
    """Lion with bf16 momentum: 2 bytes a logit."""

    update: ClassVar[Callable[..., None]] = staticmethod(lion_update)
    names, kernel = ("momentum",), "lion"

    def numbers(self, rate: float) -> list[float]:
        """Rate, decay, beta1, 1 - beta1, beta2, 1 - beta2."""
        one, two = self.section.betas
        return [rate, self.section.weight_decay, one, 1 - one, two, 1 - two]


class Lion8bit(Lion):
    """Lion with int8 momentum in steps of 2^e, one e for all candidates of ``BLOCK`` groups of a
    row: 1.02 bytes a logit at 2:4.

    A product of 7 bits and a power of two is a bf16 number, so a snapshot holds bf16 momentum and
    loses nothing: the values come back exactly wherever shards hold whole blocks (local groups a
    multiple of 8, or rows that are not split).
    """

    update, kernel = staticmethod(lion8bit_update), "lion8bit"

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """The momentum as bf16, exactly."""
        return {"momentum": [dequantize(*state).bfloat16() for state in self.state]}

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Exact where the blocks are those of the snapshot, else rounded to the nearest step."""
        for (codes, exponents), loaded in zip(self.state, moments["momentum"], strict=True):
            value = loaded.to(codes.device, torch.float32)
            exponents.copy_(_exponents(value))
            codes.copy_((value * _power(254 - _by_group(exponents, value.shape[2]))).round())

    def new_state(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes of 0, and the smallest exponents."""
        exponents = torch.ones(
            logits.shape[0], -(-logits.shape[2] // BLOCK), dtype=torch.uint8, device=logits.device
        )
        return torch.zeros(logits.shape, dtype=torch.int8, device=logits.device), exponents


def dequantize(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """fp32 momentum (O, C, G)."""
    return codes.float() * _power(_by_group(exponents, codes.shape[2]))


def _exponents(value: torch.Tensor) -> torch.Tensor:
    """(O, B): biased exponents of the smallest powers of two in which each block of ``value`` (O,
    C, G) is at most 127 (1.984375 * 2^6).
    """
    largest_OG = value.abs().amax(1)
    blocks = -(-largest_OG.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(largest_OG, (0, blocks * BLOCK - largest_OG.shape[1]))
    bits = padded.unflatten(1, (blocks, BLOCK)).amax(2).view(torch.int32)
    return ((bits >> 23) - 6 + ((bits & 0x7FFFFF) > 0x7E0000).int()).clamp(min=1)


def _by_group(exponents: torch.Tensor, groups: int) -> torch.Tensor:
    """(O, 1, G) int32 from (O, B)."""
    return exponents.int().repeat_interleave(BLOCK, dim=1)[:, None, :groups]


def _power(biased: torch.Tensor) -> torch.Tensor:
    """2^(biased - 127), exact."""
    return (biased << 23).view(torch.float32)
