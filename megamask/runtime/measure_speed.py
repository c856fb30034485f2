"""Times of products of T tokens with a weight, dense and by each 2:4 kernel.

Times are those of eager PyTorch, the work of the host included: a product of few tokens is as short
as its launch, in a model too. The sides are timed in turn, A B A B …, so that other work and the
clock of the device change both. Calls go through several copies of the weight, which together are
larger than the device's cache, because a model's weights come from memory at each pass.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megamask.runtime.device_facts import DeviceFacts, facts_of
from megamask.runtime.sparse_kernels import KERNELS, P24, Shape, bytes_of, is_exact, short
from megamask.runtime.speed_table import Row

Work = Callable[[], object]
WARM_UP = 2  # calls of a side before it is timed
SPAN = 2e-3  # seconds that a time covers at least, in calls one after the other
MOST_CALLS = 200
CACHES = 3  # sizes of the cache that the copies of a weight take together
CHECKED = 64  # tokens whose products are compared with fp32
# Of the largest product. Products in 16 bits are added in fp32 and rounded once, by at most 2**-9
# of a value in bf16; the order of the additions differs.
TOLERANCE = 2.0**-7
DENSE = "dense"


class Device(Protocol):
    """What times are taken of."""

    @property
    def kernels(self) -> Sequence[str]:
        """Names of the 2:4 kernels to try."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the largest cache."""

    @property
    def place(self) -> torch.device:
        """Where tensors lie."""

    def facts(self) -> DeviceFacts:
        """Device and software."""

    def convert(self, kernel: str, weight_OI: Tensor) -> Tensor:
        """The weight as a kernel of ``kernels`` takes it. Raises what the library raises."""

    def now(self) -> float:
        """Seconds on a clock, after the device has finished its work."""

    def peak_bytes(self) -> int:
        """The most bytes of tensors at once since the call before; the count begins anew."""


class CudaDevice:
    """The CUDA device of this process, with PyTorch's kernels."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.kernels = tuple(KERNELS)
        self.cache_bytes = int(torch.cuda.get_device_properties(place).L2_cache_size)

    def facts(self) -> DeviceFacts:
        """Device and software."""
        return facts_of(self.place)

    def convert(self, kernel: str, weight_OI: Tensor) -> Tensor:
        """The weight as PyTorch's class of the kernel."""
        converted: Tensor = KERNELS[kernel].convert(weight_OI)
        return converted

    def now(self) -> float:
        """Seconds, after the device has finished."""
        torch.cuda.synchronize(self.place)
        return time.perf_counter()

    def peak_bytes(self) -> int:
        """Of PyTorch's allocator."""
        found = torch.cuda.max_memory_allocated(self.place)
        torch.cuda.reset_peak_memory_stats(self.place)
        return found


@torch.no_grad()  # as transformers generates
def measure_shape(
    device: Device, shape: Shape, dtype: torch.dtype, tokens: Iterable[int], rounds: int
) -> Iterator[Row]:
    """The rows of a shape: for each number of tokens, one of each kernel.

    A kernel that does not take the weight, fails or multiplies wrongly gets rows without a 2:4
    time, which say why.

    Args:
        device: what is timed.
        shape: (O, I) of the weight, whose values are random.
        dtype: of weight and activations.
        tokens: numbers of tokens.
        rounds: how often each side is timed.
    """
    copies = _copies(device, shape, dtype)
    converted, refused = dict[str, list[Tensor]](), dict[str, str]()
    for kernel in device.kernels:
        if why := KERNELS[kernel].why_not(shape, dtype):
            refused[kernel] = why
            continue
        try:
            converted[kernel] = [device.convert(kernel, weight) for weight in copies]
            if not is_exact(converted[kernel][0], copies[0]):
                raise RuntimeError("the converted weight holds other numbers")
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:  # what PyTorch raises of a kernel
            converted.pop(kernel, None)
            refused[kernel] = told(error)
    for count in tokens:
        x_TI = torch.randn(count, shape[1], device=device.place, dtype=dtype)
        sides: dict[str, Work] = {DENSE: _product(x_TI, copies)}
        failed = dict(refused)
        for kernel, weights in converted.items():
            if why := _wrong(x_TI, weights[0], copies[0]):
                failed[kernel] = why
            else:
                sides[kernel] = _product(x_TI, weights)
        seconds = in_turn(device.now, sides, rounds)
        for kernel in device.kernels:
            yield _row(shape, dtype, count, kernel, seconds, copies, converted, failed)


def in_turn(
    now: Callable[[], float], sides: Mapping[str, Work], rounds: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Seconds of a call of each side in each round, the sides in turn.

    Args:
        now: the clock.
        sides: name -> the work.
        rounds: how often each is timed, over as many calls as take ``SPAN``.
        warm_up: calls of each side before, beside the call that tells how long it takes.
    """
    calls = {}
    for side, work in sides.items():
        for _ in range(warm_up):
            work()
        begin = now()
        work()
        calls[side] = max(1, min(MOST_CALLS, math.ceil(SPAN / max(now() - begin, 1e-9))))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            begin = now()
            for _ in range(calls[side]):
                work()
            seconds[side].append((now() - begin) / calls[side])
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def told(error: Exception) -> str:
    """The first line of a library's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _copies(device: Device, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Random 2:4 weights (O, I)."""
    made = torch.Generator(device.place).manual_seed(0)
    weight = torch.randn(shape, generator=made, device=device.place) / math.sqrt(shape[1])
    if shape[1] % P24.m == 0:
        weight = weight.masked_fill(~P24.best(weight.abs()), 0.0)
    weight = weight.to(dtype)
    count = 1 + CACHES * device.cache_bytes // max(bytes_of(weight), 1)
    return [weight, *(weight.clone() for _ in range(min(count, 1000) - 1))]


def _product(x_TI: Tensor, weights: Sequence[Tensor]) -> Work:
    each = cycle(weights)
    return lambda: F.linear(x_TI, next(each))


def _wrong(x_TI: Tensor, converted: Tensor, weight_OI: Tensor) -> str:
    """What is wrong with the product of a kernel; empty if it is right."""
    try:
        found = F.linear(x_TI, converted)[:CHECKED].float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        return told(error)
    expected = x_TI[:CHECKED].float() @ weight_OI.float().t()
    share = float((found - expected).abs().max() / expected.abs().max())
    return "" if share <= TOLERANCE else f"wrong products: {share:.3g} of the largest"


def _row(
    shape: Shape,
    dtype: torch.dtype,
    tokens: int,
    kernel: str,
    seconds: Mapping[str, Sequence[float]],
    copies: Sequence[Tensor],
    converted: Mapping[str, Sequence[Tensor]],
    failed: Mapping[str, str],
) -> Row:
    dense = seconds[DENSE]
    is_timed = kernel in seconds
    pairs = [
        one / other for one, other in zip(dense, seconds.get(kernel, ()), strict=is_timed)
    ]  # of the same round
    return Row(
        out_features=shape[0],
        in_features=shape[1],
        dtype=short(dtype),
        tokens=tokens,
        kernel=kernel,
        dense_ms=statistics.median(dense) * 1e3,
        sparse_ms=statistics.median(seconds[kernel]) * 1e3 if is_timed else None,
        speed_up=quartiles(pairs) if is_timed else (),
        dense_bytes=bytes_of(copies[0]),
        sparse_bytes=bytes_of(converted[kernel][0]) if is_timed else None,
        why=failed.get(kernel, ""),
    )
