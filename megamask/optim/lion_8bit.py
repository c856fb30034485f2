"""Lion with 8-bit momentum: m = code 2^e, with an int8 code for each logit and one exponent e for
all logits of ``BLOCK`` neighbouring groups of a row.

Shapes: O rows, C logits of a group, G groups per row, B blocks per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.optim.base import MaskOptimizer
from megamask.optim.lion import Lion, LionRule, move_logits
from megamask.optim.stochastic_rounding import noise_words
from megamask.sparsity.noise import NoiseKey

if TYPE_CHECKING:
    from megamask.parallel.masked_linear import MaskedLinear

# Groups whose logits share one exponent. The number is small so that shards of all usual sizes hold
# whole blocks.
BLOCK = 8


def lion8bit_update(
    logits: torch.Tensor,
    grad: torch.Tensor,
    codes: torch.Tensor,
    exponents: torch.Tensor,
    ids_OG: torch.Tensor,
    key: NoiseKey,
    numbers: torch.Tensor,
) -> None:
    """Update ``logits`` (O, C, G) and the momentum, codes (O, C, G) int8 times 2^(exponents - 127)
    with exponents (O, B) uint8, in place. This is the reference of the kernels.
    """
    noise = noise_words(key, ids_OG, logits.shape[1])
    fresh = move_logits(logits, grad, dequantize(codes, exponents), numbers, noise)
    exponents.copy_(_exponents(fresh))
    steps = fresh * _power(254 - _by_group(exponents, fresh.shape[2]))
    codes.copy_((steps + ((noise >> 16) + 0.5) * 2.0**-16).floor())


class Lion8bit(Lion):
    """Lion with an int8 code a logit and a byte of exponent a block: 1.02 bytes a logit at 2:4.

    A code of 7 bits times a power of two is a bf16 number, so a snapshot holds the momentum as bf16
    without a loss. The values come back exactly wherever shards hold whole blocks: where 8 divides
    the local number of groups, or where rows are not split.
    """

    update, has_whole_groups = staticmethod(lion8bit_update), True

    @staticmethod
    def kernel() -> Callable[..., Any]:
        """``lion8bit_update`` in one pass on the CPU."""
        from megamask.optim.stochastic_rounding_numba import lion8bit

        return lion8bit

    @staticmethod
    def cuda_kernel() -> Any:
        """``lion8bit_update`` in one pass on CUDA."""
        from megamask.optim.stochastic_rounding_triton import lion8bit

        return lion8bit

    def new_state(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes of 0, and the smallest exponents."""
        rows, _, groups = logits.shape
        exponents = torch.ones(rows, -(-groups // BLOCK), dtype=torch.uint8, device=logits.device)
        return torch.zeros(logits.shape, dtype=torch.int8, device=logits.device), exponents

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """The momentum as bf16, exactly, in the memory of the host."""
        return {"momentum": [dequantize(*state).bfloat16().cpu() for state in self.state]}

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Restore the momentum: exactly where the blocks are those of the snapshot, otherwise
        rounded to the nearest code.
        """
        for (codes, exponents), loaded in zip(self.state, moments["momentum"], strict=True):
            value = loaded.to(codes.device, torch.float32)
            exponents.copy_(_exponents(value))
            codes.copy_((value * _power(254 - _by_group(exponents, value.shape[2]))).round())


class Lion8bitRule(LionRule):
    """Lion with one 8-bit moment and one byte per block."""

    name = "lion8bit"

    def moment_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """A code, and the share of an exponent."""
        return 1 + 1 / (BLOCK * logits_per_group)

    def saved_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """The momentum in bf16."""
        return 2.0

    def copied_bytes(self) -> float:
        """The momentum in bf16."""
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
        """8-bit Lion, for logits of either dtype."""
        return Lion8bit(section, linears, seed, use_kernels)


def dequantize(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """fp32 momentum (O, C, G) from codes (O, C, G) and exponents (O, B)."""
    return codes.float() * _power(_by_group(exponents, codes.shape[2]))


def _exponents(value: torch.Tensor) -> torch.Tensor:
    """Biased exponents (O, B): of the smallest powers of two in which each block of ``value`` (O,
    C, G) is at most 127 (1.984375 * 2^6).
    """
    largest_OG = value.abs().amax(1)
    blocks = -(-largest_OG.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(largest_OG, (0, blocks * BLOCK - largest_OG.shape[1]))
    bits = padded.unflatten(1, (blocks, BLOCK)).amax(2).view(torch.int32)
    return ((bits >> 23) - 6 + ((bits & 0x7FFFFF) > 0x7E0000).int()).clamp(min=1)


def _by_group(exponents: torch.Tensor, groups: int) -> torch.Tensor:
    """Exponents (O, 1, G) int32 of each group, from (O, B)."""
    return exponents.int().repeat_interleave(BLOCK, dim=1)[:, None, :groups]


def _power(biased: torch.Tensor) -> torch.Tensor:
    """2^(biased - 127), exact."""
    return (biased << 23).view(torch.float32)
