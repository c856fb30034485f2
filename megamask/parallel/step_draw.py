"""One sample of every layer that serves a whole step, and the one mask backward at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from megamask.parallel.masked_linear import MaskedLinear
from megamask.sparsity.draw import Sample
from megamask.sparsity.kernels.numba_host import side_by_side

Result = TypeVar("Result")


def begin_step(
    linears: Sequence[MaskedLinear], sample: Sample, norm_coef: float, sums_in_fp32: bool
) -> None:
    """``MaskedLinear.begin_step`` of every layer."""
    drawn = _each(linears, lambda one: one.begin_step(sample, norm_coef, sums_in_fp32))
    for masked, sampled in zip(linears, drawn, strict=True):
        assert masked.switch is not None
        masked.switch.note(masked.parameter_id, sampled, statistics=True)


def end_step(linears: Sequence[MaskedLinear]) -> Iterator[int]:
    """``MaskedLinear.end_step`` of every layer; yields the number of each that is done,
    ascending.
    """
    for number, _ in enumerate(_each(linears, MaskedLinear.end_step)):
        yield number


def _each(
    linears: Sequence[MaskedLinear], work: Callable[[MaskedLinear], Result]
) -> Iterator[Result]:
    """``work`` of every layer, in order; a layer a thread where the kernels leave the threads to
    us.
    """
    is_threaded = all(linear.backend == "numba" for linear in linears)
    return side_by_side(work, linears) if is_threaded else map(work, linears)
