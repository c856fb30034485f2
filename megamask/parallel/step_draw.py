"""One draw of every layer that serves a whole step, and the one mask backward at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from megamask.parallel.masked_linear import MaskedLinear
from megamask.sparsity.draw import Draw
from megamask.sparsity.kernels.threads import side_by_side

Result = TypeVar("Result")


def begin_step(linears: Sequence[MaskedLinear], draw: Draw, sums_in_fp32: bool) -> None:
    """``MaskedLinear.begin_step`` of every layer."""
    for masked, sampled in zip(
        linears, _each(linears, lambda one: one.begin_step(draw, sums_in_fp32)), strict=True
    ):
        assert masked.switch is not None
        masked.switch.note(masked.parameter_id, sampled, draw.watch)


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
