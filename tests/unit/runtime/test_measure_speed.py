"""The timing code on a CPU, with dense functions in the place of 2:4 kernels."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from megamask.runtime.measure_speed import CHECKED, MOST_CALLS, in_turn, measure_shape, quartiles
from megamask.runtime.speed_table import SpeedTable
from tests.unit.runtime.cpu_kernels import FACTS, CpuDevice, products_on_a_cpu

BF16 = torch.bfloat16


class Clock:
    """A clock that only work moves on."""

    def __init__(self) -> None:
        self.seconds, self.order = 0.0, list[str]()

    def work(self, side: str, seconds: list[float]) -> None:
        """Take the seconds of the next call; the last of them stays."""
        self.order.append(side)
        self.seconds += seconds.pop(0) if len(seconds) > 1 else seconds[0]


def test_sides_are_timed_in_turn_and_a_time_is_that_of_a_call() -> None:
    clock = Clock()
    slow, fast = [9.0, 9.0, 4.0], [7.0, 7.0, 2.1e-4]  # two calls of a side are not counted
    found = in_turn(
        lambda: clock.seconds,
        {"dense": lambda: clock.work("d", slow), "2:4": lambda: clock.work("s", fast)},
        rounds=3,
    )
    assert found["dense"] == [pytest.approx(4.0)] * 3
    assert found["2:4"] == [pytest.approx(2.1e-4)] * 3
    # 2 calls that are not counted and 1 that tells how many a time covers: 10 of 0.21 ms
    assert "".join(clock.order) == "dddsss" + ("d" + "s" * 10) * 3
    clock = Clock()
    in_turn(lambda: clock.seconds, {"x": lambda: clock.work("x", [1e-12])}, rounds=1)
    assert len(clock.order) == 3 + MOST_CALLS


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_a_shape_has_a_row_for_each_number_of_tokens_and_kernel() -> None:
    device = CpuDevice(("cutlass", "cusparselt"))
    with products_on_a_cpu():
        rows = list(measure_shape(device, (64, 128), BF16, (1, CHECKED + 1), rounds=3))
    assert [(one.tokens, one.kernel) for one in rows] == [
        (count, kernel) for count in (1, CHECKED + 1) for kernel in ("cutlass", "cusparselt")
    ]
    for one in rows[::2]:
        assert (one.dense_bytes, one.sparse_bytes, one.why) == (16384, 9216, "")
        low, median, high = one.speed_up
        assert one.sparse_ms and 0 < low <= median <= high and one.dense_ms > 0
    for one in rows[1::2]:  # which has no conversion on a CPU
        assert (one.sparse_ms, one.speed_up, one.sparse_bytes) == (None, (), None)
        assert "CUDA" in one.why or "cusparselt" in one.why.lower()


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((48, 128), BF16, "cutlass takes multiples of 32 rows"),
        ((64, 30), BF16, "cutlass takes multiples of 32 rows"),
        ((64, 128), torch.float32, "fp32: 2:4 kernels take"),
    ],
)
def test_a_weight_that_a_kernel_does_not_take_says_so(
    shape: tuple[int, int], dtype: torch.dtype, why: str
) -> None:
    (found,) = measure_shape(CpuDevice(), shape, dtype, (2,), rounds=1)
    assert found.sparse_ms is None and found.why.startswith(why) and found.dense_ms > 0


def test_wrong_products_and_failures_get_no_time() -> None:
    def broken(weight: Tensor) -> Tensor:
        raise RuntimeError("no such architecture\nbacktrace")

    (found,) = measure_shape(CpuDevice(convert=broken), (64, 128), BF16, (2,), rounds=1)
    assert (found.sparse_ms, found.why) == (None, "no such architecture")
    (found,) = measure_shape(
        CpuDevice(convert=lambda weight: weight * 1.01), (64, 128), BF16, (2,), rounds=1
    )
    assert found.why == "the converted weight holds other numbers"
    # The weight comes back right, and its products are wrong by 5 % of the largest.

    def off(weight: Tensor) -> Tensor:
        made: Tensor = weight.as_subclass(_Off)
        return made

    (found,) = measure_shape(CpuDevice(convert=off), (64, 128), BF16, (2,), rounds=1)
    told = re.fullmatch(r"wrong products: (\S+) of the largest", found.why)
    # the product of bf16 numbers and 1.05 is rounded to bf16, by up to 2^-8 of either side
    assert found.sparse_ms is None and told is not None
    assert float(told[1]) == pytest.approx(0.05, abs=2 * 2**-8)
    choice = SpeedTable(FACTS, {2: 1}, [found]).choose((64, 128), "bf16", {2: 1})
    assert choice.kernel is None and choice.why.startswith("not possible: wrong products")


class _Off(Tensor):
    """A weight whose products in ``F.linear`` are too large."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found * 1.05 if func is torch.nn.functional.linear else found


def test_the_copies_of_a_weight_are_larger_than_the_cache() -> None:
    converted = list[int]()

    def keep(weight: Tensor) -> Tensor:
        converted.append(weight.data_ptr())
        return weight

    device = CpuDevice(convert=keep, cache_bytes=3 * 16384)
    list(measure_shape(device, (64, 128), BF16, (1,), rounds=1))
    assert len(set(converted)) == len(converted) == 1 + 3 * 3  # of 16,384 bytes each
