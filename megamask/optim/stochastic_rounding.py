"""Update rules that keep 16 or 8 bits a number: fp32 arithmetic, logit by logit, then stochastic
rounding by keyed noise.

A step moves a moment, and a logit even more so, by less than bf16's spacing of 0.4 to 0.8 %:
rounding to nearest would lose most of it. Values are rounded up with the probability of the part
that is cut off, which keeps the mean exact. The noise is keyed by step, parameter and global group,
hence the same in every layout and after a resume.

One word of 32 bits a logit rounds three numbers: its low half, its high half and their exclusive or
are each uniform and independent in pairs, so every mean and every covariance is that of independent
noise.

Shapes: O rows, C candidates, G groups per row.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from megamask.config.tree import OptimizerSection
from megamask.optim.base import MaskOptimizer
from megamask.parallel.masked_linear import MaskedLinear
from megamask.sparsity.noise import NoiseKey, philox

CHUNK = (
    2**20
)  # logits that eager PyTorch updates at a time: its noise takes 8 bytes each, several times over
# stands in the noise key's place for the micro-batch, of which there are never so many
UPDATE = 0xFFFFFFFF


class RoundingOptimizer(MaskOptimizer):
    """A rule that updates each logit by itself (or each group), in one pass: numba's on CPUs,
    compiled PyTorch on CUDA.

    Attributes:
        names: of the tensors of its state, as a snapshot calls them.
        update: the rule in PyTorch, ``update(logits, grad, *state, ids_OG, key, numbers)``, in
            place.
        kernel: the name of the same rule in ``stochastic_rounding_numba``, bit for bit.
        state: of each linear's logits, a tensor for each of ``names``.
    """

    names: ClassVar[tuple[str, ...]]
    update: ClassVar[Callable[..., None]]
    kernel: ClassVar[str]

    def __init__(
        self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int, use_numba: bool
    ) -> None:
        super().__init__(section, linears, seed)
        self.use_numba = use_numba
        self.state = [self.new_state(logits) for logits in self.logits]

    @abstractmethod
    def numbers(self, rate: float) -> list[float]:
        """What the rule computes with in this step; the clip factor comes after them."""

    def new_state(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state of ``logits`` before the first step: a bf16 zero each."""
        return tuple(
            torch.zeros(logits.shape, dtype=torch.bfloat16, device=logits.device)
            for _ in self.names
        )

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """One update of every logit, in one pass over each. Nothing waits for the device."""
        fixed = torch.tensor(self.numbers(rate), dtype=torch.float32).to(
            clip_factor.device, non_blocking=True
        )
        numbers = torch.cat([fixed, clip_factor.float().reshape(1)])
        apply = self._on_cpu if self.use_numba else self._on_device
        for linear, logits, state in zip(self.linears, self.logits, self.state, strict=True):
            key = NoiseKey(self.seed, step, UPDATE, linear.parameter_id)
            apply(
                linear,
                logits.detach(),
                state,
                (key.seed, key.step, key.micro_batch, key.parameter),
                numbers,
            )
            logits.grad = None

    def state_tensors(self) -> list[torch.Tensor]:
        """Every tensor of ``state``."""
        return [tensor for state in self.state for tensor in state]

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """The state as it is, by name."""
        return {
            name: [state[number] for state in self.state] for number, name in enumerate(self.names)
        }

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Exact."""
        for name, mine in self.moments().items():
            for tensor, loaded in zip(mine, moments[name], strict=True):
                tensor.copy_(loaded)

    def _on_cpu(
        self,
        linear: MaskedLinear,
        logits: torch.Tensor,
        state: Any,
        key: tuple[int, ...],
        numbers: torch.Tensor,
    ) -> None:
        import numpy as np

        from megamask.optim import stochastic_rounding_numba
        from megamask.sparsity.kernels.numba_host import on_all_threads, raw_bits

        kernel = getattr(stochastic_rounding_numba, self.kernel)
        arrays = [
            raw_bits(one) if one.is_floating_point() else one.numpy()
            for one in (logits, _gradient(linear), *state)
        ]
        place, words, floats = (
            linear.site.placement,
            tuple(map(np.uint64, key)),
            tuple(numbers.numpy()),
        )

        def work(rows: slice, global_row: int) -> None:
            kernel(
                *(array[rows] for array in arrays),
                (global_row, place.first_group, place.groups_in_row),
                words,
                floats,
            )

        on_all_threads(place.blocks, work)

    def _on_device(
        self,
        linear: MaskedLinear,
        logits: torch.Tensor,
        state: Any,
        key: tuple[int, ...],
        numbers: torch.Tensor,
    ) -> None:
        update = type(self).update
        ids_OG = linear.site.placement.group_ids(logits.shape[2], logits.device)
        key_words = torch.tensor(key).to(logits.device, non_blocking=True)
        tensors = (logits, _gradient(linear), *state, ids_OG)
        if logits.device.type == "cuda" and importlib.util.find_spec("triton"):
            _compiled(update)(*tensors, key_words, numbers)
            return
        rows = max(1, CHUNK // logits[0].numel())
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            update(*parts, key_words, numbers)


def store(target: torch.Tensor, value: torch.Tensor, noise: torch.Tensor) -> None:
    """Copy fp32 ``value`` into ``target``, rounded stochastically if that is bf16; ``noise`` is
    uniform in [0, 2^16).
    """
    target.copy_(round_stochastically(value, noise) if target.dtype == torch.bfloat16 else value)


def round_stochastically(value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """bf16 of fp32 ``value``: away from zero with the probability of the 16 bits that are cut off.
    ``noise`` is uniform in [0, 2^16).
    """
    bits = (value.view(torch.int32) + noise.int()) & -0x10000
    return bits.view(torch.float32).bfloat16()


def words(key: torch.Tensor, ids_OG: torch.Tensor, candidates: int) -> torch.Tensor:
    """The words that ``philox.words`` gives for (group, candidate), (O, C, G); every element by
    itself, which compiles to one kernel.
    """
    seed, step, micro_batch, parameter = key.unbind()
    candidate = torch.arange(candidates, device=ids_OG.device)[:, None]
    ids = ids_OG[:, None]
    four = philox(
        (ids & 0xFFFFFFFF, ((ids >> 32) << 8) | (candidate >> 2), parameter, micro_batch),
        (seed, step),
    )  # type: ignore[arg-type]
    lane = candidate & 3
    return torch.where(
        lane < 2, torch.where(lane == 0, four[0], four[1]), torch.where(lane == 2, four[2], four[3])
    )


@functools.lru_cache(maxsize=2)
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    """``update`` as one fused kernel."""
    return torch.compile(update)


def _gradient(linear: MaskedLinear) -> torch.Tensor:
    """The summed gradient of the logits, fp32 or bf16."""
    grad: torch.Tensor = linear.mask_logits.main_grad  # type: ignore[union-attr, assignment]
    return grad
