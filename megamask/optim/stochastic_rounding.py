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

import functools
import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.optim.base import MaskOptimizer
from megamask.sparsity.noise import philox

if TYPE_CHECKING:
    from megamask.parallel.masked_linear import MaskedLinear

# Logits that PyTorch updates at a time without compiling: noise takes several times 8 bytes each.
CHUNK = 2**20
# The noise of an update has this number in place of a micro-batch's, which never gets so large.
UPDATE = 0xFFFFFFFF


class RoundingOptimizer(MaskOptimizer):
    """An update rule that updates each logit (or each group) on its own, in one pass over logits,
    gradients and state: by a numba kernel on CPUs, by compiled PyTorch on CUDA.

    Attributes:
        names: the names of the state tensors in a snapshot.
        update: the rule in PyTorch, ``update(logits, grad, *state, ids_OG, key, numbers)``, in
            place.
        state: for each linear the state tensors of its logits, in the order of ``names``.
    """

    names: ClassVar[tuple[str, ...]]
    update: ClassVar[Callable[..., None]]

    def __init__(
        self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int, use_numba: bool
    ) -> None:
        super().__init__(section, linears, seed)
        self.state = [self.new_state(logits) for logits in self.logits]
        self._kernel = self.kernel() if use_numba else None

    @abstractmethod
    def numbers(self, rate: float) -> list[float]:
        """The numbers of the rule in this step, from which ``update`` and the kernel compute. The
        clip factor is appended to them.
        """

    @staticmethod
    def kernel() -> Callable[..., Any] | None:
        """The numba kernel that gives the same bits as ``update``, or None: a rule without a kernel
        runs in PyTorch on CPUs too.
        """
        return None

    def new_state(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state of ``logits`` before the first step: bf16 zeros for each name."""
        return tuple(
            torch.zeros(logits.shape, dtype=torch.bfloat16, device=logits.device)
            for _ in self.names
        )

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """Update all logits, each tensor in one pass. The host never waits for the device."""
        fixed = torch.tensor(self.numbers(rate), dtype=torch.float32).to(
            clip_factor.device, non_blocking=True
        )
        numbers = torch.cat([fixed, clip_factor.float().reshape(1)])
        for linear, logits, state in zip(self.linears, self.logits, self.state, strict=True):
            tensors = (logits.detach(), logits.main_grad, *state)  # type: ignore[attr-defined]
            key = (self.seed, step, UPDATE, linear.parameter_id)
            if self._kernel is not None:
                self._on_cpu(self._kernel, linear, tensors, key, numbers)
            else:
                self._on_device(linear, tensors, key, numbers)
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

    def _on_cpu(
        self,
        kernel: Callable[..., Any],
        linear: MaskedLinear,
        tensors: tuple[torch.Tensor, ...],
        key: tuple[int, ...],
        numbers: torch.Tensor,
    ) -> None:
        """Run the numba kernel on all threads, each with rows of its own."""
        import numpy as np

        from megamask.sparsity.kernels.numba_host import on_all_threads, raw_bits

        arrays = [raw_bits(one) if one.is_floating_point() else one.numpy() for one in tensors]
        place, words = linear.site.placement, tuple(map(np.uint64, key))
        floats = tuple(numbers.numpy())

        def work(rows: slice, global_row: int) -> None:
            groups = (global_row, place.first_group, place.groups_in_row)
            kernel(*(array[rows] for array in arrays), groups, words, floats)

        on_all_threads(place.blocks, work)

    def _on_device(
        self,
        linear: MaskedLinear,
        tensors: tuple[torch.Tensor, ...],
        key: tuple[int, ...],
        numbers: torch.Tensor,
    ) -> None:
        """Run ``update``: compiled on CUDA, otherwise on a few rows at a time."""
        update, logits = type(self).update, tensors[0]
        ids_OG = linear.site.placement.group_ids(logits.shape[2], logits.device)
        key_words = torch.tensor(key).to(logits.device, non_blocking=True)
        if logits.device.type == "cuda" and importlib.util.find_spec("triton"):
            _compiled(update)(*tensors, ids_OG, key_words, numbers)
            return
        rows = max(1, CHUNK // logits[0].numel())
        for parts in zip(*(tensor.split(rows) for tensor in (*tensors, ids_OG)), strict=True):
            update(*parts, key_words, numbers)


def store(target: torch.Tensor, value: torch.Tensor, noise: torch.Tensor) -> None:
    """Copy fp32 ``value`` to ``target``, and round it stochastically if ``target`` is bf16.
    ``noise`` is uniform in [0, 2^16).
    """
    target.copy_(round_stochastically(value, noise) if target.dtype == torch.bfloat16 else value)


def round_stochastically(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp32 ``value`` as bf16, rounded away from zero with the probability of the 16 bits that are
    cut off. ``noise`` is uniform in [0, 2^16).
    """
    bits = (value.view(torch.int32) + noise.int()) & -0x10000
    return bits.view(torch.float32).bfloat16()


def noise_words(key: torch.Tensor, ids_OG: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` words of each group, (O, count, G): the same words as ``noise.words``
    gives, but each is computed on its own, so that torch.compile makes one kernel of it.

    Args:
        key: seed, step, micro-batch and parameter, int64.
        ids_OG: global group ids.
        count: C.
    """
    seed, step, micro_batch, parameter = key.unbind()
    position = torch.arange(count, device=ids_OG.device)[:, None]
    ids = ids_OG[:, None]
    four = philox(
        (ids & 0xFFFFFFFF, ((ids >> 32) << 8) | (position >> 2), parameter, micro_batch),
        (seed, step),  # type: ignore[arg-type]
    )
    lane = position & 3
    return torch.where(
        lane < 2, torch.where(lane == 0, four[0], four[1]), torch.where(lane == 2, four[2], four[3])
    )


@functools.lru_cache(maxsize=2)
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    """``update`` as one fused kernel."""
    return torch.compile(update)
