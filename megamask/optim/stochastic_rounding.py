"""Stochastic rounding, for update rules that keep bf16 or 8-bit numbers and compute in fp32.

A step moves a moment, and a logit even more so, by less than the spacing of bf16 numbers, which is
0.4 to 0.8 %. Rounding to nearest would lose most of such a step. Stochastic rounding rounds a value
away from zero with the probability of the part that is cut off, which keeps its mean exact. The
noise is a function of seed, step, parameter and global group (Philox, see sparsity/noise.py). It is
therefore the same in every layout and after a resume.

One random word of 32 bits a logit rounds three numbers: by its low half, by its high half, and by
the exclusive or of both halves. The three are uniform and independent in pairs, so all means and
covariances of the rounded numbers are those of independent noise.

Shapes: O rows, C logits of a group, G groups per row.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.optim.base import MaskOptimizer
from megamask.sparsity import noise
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.noise import NoiseKey

if TYPE_CHECKING:
    from megamask.parallel.masked_linear import MaskedLinear
    from megamask.sparsity.shard import Placement

# Logits that PyTorch updates at a time: noise takes several times 8 bytes each.
CHUNK = 2**20
# The noise of an update has this number in place of a micro-batch's, which never gets so large.
UPDATE = 0xFFFFFFFF
# Groups that a thread of a CUDA kernel updates at once in a big layer: reads of 64 bits in bf16.
GROUPS_A_THREAD = 4
# The most logits a group whose new momenta stay in the registers of a CUDA kernel.
KEPT = 8


class RoundingOptimizer(MaskOptimizer):
    """An update rule that updates each logit (or each group) on its own, in one pass over logits,
    gradients and state: by a numba kernel on CPUs, by a Triton kernel on CUDA, or in plain PyTorch.

    Attributes:
        names: the names of the state tensors in a snapshot.
        update: the rule in PyTorch, ``update(logits, grad, *state, ids_OG, key, numbers)``, in
            place.
        has_whole_groups: whether a program of the CUDA kernel has all logits of its groups, and not
            four of them.
        state: for each linear the state tensors of its logits, in the order of ``names``.
        use_kernels: whether kernels may update the logits.
    """

    names: ClassVar[tuple[str, ...]]
    update: ClassVar[Callable[..., None]]
    has_whole_groups: ClassVar[bool] = False

    def __init__(
        self,
        section: OptimizerSection,
        linears: Sequence[MaskedLinear],
        seed: int,
        use_kernels: bool,
    ) -> None:
        super().__init__(section, linears, seed)
        self.state = [self.new_state(logits) for logits in self.logits]
        self.use_kernels = use_kernels

    @abstractmethod
    def numbers(self, rate: float) -> list[float]:
        """The numbers of the rule in this step, from which ``update`` and the kernels compute. The
        clip factor is appended to them.
        """

    @staticmethod
    @abstractmethod
    def kernel() -> Callable[..., Any]:
        """The numba kernel that gives the same bits as ``update``."""

    @staticmethod
    @abstractmethod
    def cuda_kernel() -> Any:
        """The Triton kernel that gives the same bits as ``update``."""

    def new_state(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state of ``logits`` before the first step: bf16 zeros for each name."""
        return tuple(
            torch.zeros(logits.shape, dtype=torch.bfloat16, device=logits.device)
            for _ in self.names
        )

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """Update all logits, each tensor in one pass. On CUDA the kernels read the clip factor in
        the device's memory, so the host never waits for the device.
        """
        numbers = [float(one) for one in self.numbers(rate)]
        for linear, logits, state in zip(self.linears, self.logits, self.state, strict=True):
            tensors = (logits.detach(), logits.main_grad, *state)  # type: ignore[attr-defined]
            key = NoiseKey(self.seed, step, UPDATE, linear.parameter_id)
            run = self.by_pytorch
            if self.use_kernels:
                run = self.by_triton if logits.is_cuda else self.by_numba
            run(linear.site.placement, tensors, key, numbers, clip_factor)
            logits.grad = None

    def state_tensors(self) -> list[torch.Tensor]:
        """All tensors of ``state``."""
        return [tensor for state in self.state for tensor in state]

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """The state by name."""
        return {
            name: [state[number] for state in self.state] for number, name in enumerate(self.names)
        }

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Restore the state exactly."""
        for name, mine in self.moments().items():
            for tensor, loaded in zip(mine, moments[name], strict=True):
                tensor.copy_(loaded)

    def by_numba(
        self,
        place: Placement,
        tensors: tuple[torch.Tensor, ...],
        key: NoiseKey,
        numbers: list[float],
        clip_factor: torch.Tensor,
    ) -> None:
        """Run the numba kernel on all threads, each with rows of its own."""
        import numpy as np

        from megamask.sparsity.kernels.numba_host import on_all_threads, raw_bits

        kernel = self.kernel()
        arrays = [raw_bits(one) if one.is_floating_point() else one.numpy() for one in tensors]
        words = tuple(map(np.uint64, (key.seed, key.step, key.micro_batch, key.parameter)))
        floats = tuple(map(np.float32, (*numbers, float(clip_factor))))

        def work(rows: slice, global_row: int) -> None:
            groups = (global_row, place.first_group, place.groups_in_row)
            kernel(*(array[rows] for array in arrays), groups, words, floats)

        on_all_threads(place.blocks, work)

    def by_triton(
        self,
        place: Placement,
        tensors: tuple[torch.Tensor, ...],
        key: NoiseKey,
        numbers: list[float],
        clip_factor: torch.Tensor,
    ) -> None:
        """Launch the Triton kernel once."""
        assert all(one.is_contiguous() for one in tensors)
        logits = tensors[0]
        rows, candidates, groups = logits.shape
        cut = triton_host.Cut.of(rows, groups, GROUPS_A_THREAD)
        constants = {"ROWS": cut.rows, "COLS": cut.cols}
        if self.has_whole_groups:
            programs = cut.programs(rows)
            constants["C"] = candidates if candidates <= KEPT else 0
        else:
            programs = cut.programs(rows) * math.ceil(candidates / 4)
        triton_host.launch(
            self.cuda_kernel(),
            programs,
            logits,
            *tensors,
            clip_factor.float().reshape(1),
            *numbers,
            *(rows, candidates, groups),
            *_global_rows(place),
            *(place.first_group, place.groups_in_row),
            *(key.seed, key.step, key.parameter, key.micro_batch),
            **constants,
        )

    def by_pytorch(
        self,
        place: Placement,
        tensors: tuple[torch.Tensor, ...],
        key: NoiseKey,
        numbers: list[float],
        clip_factor: torch.Tensor,
    ) -> None:
        """Run ``update`` on a few rows at a time."""
        logits = tensors[0]
        fixed = torch.tensor(numbers, dtype=torch.float32, device=logits.device)
        with_clip = torch.cat([fixed, clip_factor.float().reshape(1)])
        ids_OG, rows = place.group_ids(logits.shape[2], logits.device), CHUNK // logits[0].numel()
        for parts in zip(*(one.split(max(1, rows)) for one in (*tensors, ids_OG)), strict=True):
            type(self).update(*parts, key, with_clip)


def _global_rows(place: Placement) -> tuple[int, int, int]:
    """(global number of local row 0, rows of a block, global rows left out after a block). The row
    blocks of a shard have one size and one distance.
    """
    blocks = place.blocks
    first, gaps = blocks[0], {b.global_start - a.global_start for a, b in pairwise(blocks)}
    assert {one.rows for one in blocks} == {first.rows} and len(gaps) <= 1
    gap = gaps.pop() - first.rows if gaps else 0
    return first.global_start, first.rows, gap


def store(target: torch.Tensor, value: torch.Tensor, noise: torch.Tensor) -> None:
    """Copy fp32 ``value`` to ``target``, and round it stochastically if ``target`` is bf16.
    ``noise`` is uniform in [0, 2^16).
    """
    target.copy_(round_stochastically(value, noise) if target.dtype == torch.bfloat16 else value)


def round_stochastically(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 ``value`` as bf16, rounded away from zero with the probability of the 16 bits that are
    cut off. ``noise`` is uniform in [0, 2^16). NaN stays NaN: CUDA's NaN has all bits set, and
    would overflow to -0.
    """
    bits = (value.view(torch.int32) + noise.int()) & -0x10000
    return torch.where(value.isnan(), value, bits.view(torch.float32)).bfloat16()


def noise_words(key: NoiseKey, ids_OG: torch.Tensor, count: int) -> torch.Tensor:
    """The random words of each logit, (O, C, G) int64, of the groups with global ids ``ids_OG``;
    ``count`` is C.
    """
    return noise.words(key, ids_OG, count).movedim(0, 1)
