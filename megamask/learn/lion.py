"""Lion (Chen et al., 2023, "Symbolic Discovery of Optimization Algorithms", Alg. 2) with 16-bit or 8-bit momentum, stochastically rounded.

    u = sign(beta1 m + (1 - beta1) g);  p <- p - lr (u + decay p);  m <- beta2 m + (1 - beta2) g

Computed in fp32. At beta2 = 0.99 a step moves m by about 1 % of its size and a logit by far less than bf16's 0.4 %, so rounding to
nearest would lose most of it: values are rounded up with the probability of the part that is cut off, which keeps the mean exact. The
noise is keyed by step, parameter and global group, hence the same in every layout and after a resume.

Shapes: O rows, C candidates, G groups per row, B blocks per row.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megamask.config.tree import OptimizerSection
from megamask.learn.mask_optimizer import MaskOptimizer, update_key
from megamask.parallel.linear import MaskedLinear
from megamask.sparsity.philox import philox

BLOCK = 8  # groups; with all their candidates they share one scale. Small, so that shards of any usual size hold whole blocks
CHUNK = 2**20  # logits that eager PyTorch updates at a time: its noise takes 8 bytes each, several times over


class Lion(MaskOptimizer):
    """Lion with bf16 momentum: 2 bytes a logit."""

    def __init__(self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int, use_numba: bool) -> None:
        super().__init__(section, linears, seed)
        self.use_numba = use_numba
        self.state = [self._new_state(logits) for logits in self.logits]

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """One update of every logit, in one pass over each."""
        apply = self._on_cpu if self.use_numba else self._on_device
        numbers = self._numbers(rate, clip_factor)
        for linear, logits, state in zip(self.linears, self.logits, self.state, strict=True):
            key = update_key(self.seed, step).of(linear.parameter_id)
            apply(linear, logits.detach(), state, (key.seed, key.step, key.micro_batch, key.parameter), numbers)
            logits.grad = None

    def state_tensors(self) -> list[torch.Tensor]:
        """Momentum."""
        return [tensor for state in self.state for tensor in state]

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """bf16 momentum as it is."""
        return {"momentum": [momentum for (momentum,) in self.state]}

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Exact."""
        for (momentum,), loaded in zip(self.state, moments["momentum"], strict=True):
            momentum.copy_(loaded)

    def _new_state(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(logits.shape, dtype=torch.bfloat16, device=logits.device),)

    def _numbers(self, rate: float, clip_factor: torch.Tensor) -> torch.Tensor:
        """(7,) fp32 on the device, without waiting for it: rate, decay, beta1, 1 - beta1, beta2, 1 - beta2, clip factor."""
        one, two = self.section.betas
        fixed = [rate, self.section.weight_decay, one, 1 - one, two, 1 - two]
        device = clip_factor.device
        return torch.cat([torch.tensor(fixed, dtype=torch.float32).to(device, non_blocking=True), clip_factor.float().reshape(1)])

    def _on_cpu(self, linear: MaskedLinear, logits: torch.Tensor, state: Any, key: tuple[int, ...], numbers: torch.Tensor) -> None:
        import numpy as np

        from megamask.learn import lion_numba
        from megamask.sparsity.fused_cpu import on_all_threads, raw_bits

        kernel = lion_numba.lion if len(state) == 1 else lion_numba.lion8bit
        arrays = [raw_bits(one) if one.is_floating_point() else one.numpy() for one in (logits, logits_grad(linear), *state)]
        place, words, floats = linear.site.placement, tuple(map(np.uint64, key)), tuple(numbers.numpy())

        def work(rows: slice, global_row: int) -> None:
            kernel(*(array[rows] for array in arrays), (global_row, place.first_group, place.groups_in_row), words, floats)

        on_all_threads(place.blocks, work)

    def _on_device(self, linear: MaskedLinear, logits: torch.Tensor, state: Any, key: tuple[int, ...], numbers: torch.Tensor) -> None:
        update: Callable[..., None] = lion_update if len(state) == 1 else lion8bit_update
        ids_OG = linear.site.placement.group_ids(logits.shape[2], logits.device)
        key_words = torch.tensor(key).to(logits.device, non_blocking=True)
        tensors = (logits, logits_grad(linear), *state, ids_OG)
        if logits.device.type == "cuda" and importlib.util.find_spec("triton"):
            compiled(update)(*tensors, key_words, numbers)
            return
        rows = max(1, CHUNK // logits[0].numel())
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            update(*parts, key_words, numbers)


class Lion8bit(Lion):
    """Lion with int8 momentum in steps of 2^e, one e for all candidates of ``BLOCK`` groups of a row: 1.02 bytes a logit at 2:4.

    A product of 7 bits and a power of two is a bf16 number, so a snapshot holds bf16 momentum and loses nothing: the values come back
    exactly wherever shards hold whole blocks (local groups a multiple of 8, or rows that are not split).
    """

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

    def _new_state(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        exponents = torch.ones(logits.shape[0], -(-logits.shape[2] // BLOCK), dtype=torch.uint8, device=logits.device)
        return torch.zeros(logits.shape, dtype=torch.int8, device=logits.device), exponents


def logits_grad(linear: MaskedLinear) -> torch.Tensor:
    """The summed gradient of the logits, fp32 or bf16."""
    grad: torch.Tensor = linear.mask_logits.main_grad  # type: ignore[union-attr, assignment]
    return grad


def lion_update(
    logits: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, ids_OG: torch.Tensor, key: torch.Tensor, numbers: torch.Tensor
) -> None:
    """Update ``logits`` and bf16 ``momentum`` (O, C, G) in place: the plain reference, and what runs on other devices than CPUs."""
    noise = _words(key, ids_OG, logits.shape[1])
    fresh = _move(logits, grad, momentum.float(), numbers, noise)
    momentum.copy_(round_stochastically(fresh, noise >> 16))


def lion8bit_update(
    logits: torch.Tensor,
    grad: torch.Tensor,
    codes: torch.Tensor,
    exponents: torch.Tensor,
    ids_OG: torch.Tensor,
    key: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    """As ``lion_update``, with momentum = codes (O, C, G) int8 * 2^(exponents (O, B) uint8 - 127)."""
    noise = _words(key, ids_OG, logits.shape[1])
    fresh = _move(logits, grad, dequantize(codes, exponents), numbers, noise)
    exponents.copy_(_exponents(fresh))
    steps = fresh * _power(254 - _by_group(exponents, fresh.shape[2]))
    codes.copy_((steps + ((noise >> 16) + 0.5) * 2.0**-16).floor())


@functools.lru_cache(maxsize=2)
def compiled(update: Callable[..., None]) -> Callable[..., None]:
    """``update`` as one fused kernel."""
    return torch.compile(update)


def _move(logits: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, numbers: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Update ``logits`` in place and return the new momentum, fp32."""
    rate, decay, beta1, rest1, beta2, rest2, clip = numbers.unbind()
    slope, value = grad.float() * clip, logits.float()
    direction = (beta1 * momentum + rest1 * slope).sign()
    value = value - rate * (direction + decay * value)
    logits.copy_(round_stochastically(value, noise & 0xFFFF) if logits.dtype == torch.bfloat16 else value)
    return beta2 * momentum + rest2 * slope


def round_stochastically(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """bf16 of fp32 ``value``: away from zero with the probability of the 16 bits that are cut off. ``noise`` is uniform in [0, 2^16)."""
    bits = (value.view(torch.int32) + noise.int()) & -0x10000
    return bits.view(torch.float32).bfloat16()


def dequantize(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """fp32 momentum (O, C, G)."""
    return codes.float() * _power(_by_group(exponents, codes.shape[2]))


def _exponents(value: torch.Tensor) -> torch.Tensor:
    """(O, B): biased exponents of the smallest powers of two in which each block of ``value`` (O, C, G) is at most 127 (1.984375 * 2^6)."""
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


def _words(key: torch.Tensor, ids_OG: torch.Tensor, candidates: int) -> torch.Tensor:
    """The words that ``philox.words`` gives for (group, candidate), (O, C, G); every element by itself, which compiles to one kernel."""
    seed, step, micro_batch, parameter = key.unbind()
    candidate = torch.arange(candidates, device=ids_OG.device)[:, None]
    ids = ids_OG[:, None]
    four = philox((ids & 0xFFFFFFFF, ((ids >> 32) << 8) | (candidate >> 2), parameter, micro_batch), (seed, step))  # type: ignore[arg-type]
    lane = candidate & 3
    return torch.where(lane < 2, torch.where(lane == 0, four[0], four[1]), torch.where(lane == 2, four[2], four[3]))
