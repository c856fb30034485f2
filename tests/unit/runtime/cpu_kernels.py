"""A device for tests without a GPU: PyTorch's own conversion of 2:4 weights, and a stand-in for the
one call that needs CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import _semi_structured_conversions

from megamask.runtime.device_facts import DeviceFacts
from megamask.runtime.sparse_kernels import KERNELS, P24
from megamask.runtime.speed_table import Row
from megamask.weights.fingerprint import is_linear

FACTS = DeviceFacts("a CPU of tests", "0.0", "0.0")


class CpuDevice:
    """The CPU as a device of the timing code; ``convert`` is the real one unless given."""

    def __init__(
        self,
        kernels: Sequence[str] = ("cutlass",),
        convert: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.kernels, self.cache_bytes = kernels, cache_bytes
        self.place = torch.device("cpu")
        self._convert = convert

    def facts(self) -> DeviceFacts:
        return FACTS

    def convert(self, kernel: str, weight_OI: Tensor) -> Tensor:
        found: Tensor = (self._convert or KERNELS[kernel].convert)(weight_OI)
        return found

    def now(self) -> float:
        return time.perf_counter()

    def peak_bytes(self) -> int:
        return 7_000_000


@contextmanager
def products_on_a_cpu() -> Iterator[None]:
    """PyTorch's 2:4 products on a CPU: everything up to the kernel is PyTorch's own dispatch, and
    the kernel reads the converted weight back and multiplies.
    """

    def mm(packed: Tensor, meta: Tensor, dense: Tensor, *, out_dtype: Any = None) -> Tensor:
        read: Any = _semi_structured_conversions.sparse_semi_structured_to_dense_cutlass
        product: Tensor = read(packed, meta) @ dense
        return product

    def addmm(bias: Tensor, packed: Tensor, meta: Tensor, dense: Tensor, **_: Any) -> Tensor:
        return mm(packed, meta, dense) + bias[:, None]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_sparse_semi_structured_mm", mm, "CPU")
        library.impl("_sparse_semi_structured_addmm", addmm, "CPU")
        yield


@torch.no_grad()
def prune(model: nn.Module, but: str = "lm_head") -> None:
    """Set half of the weights of each linear to zero, 2:4, unless its name holds ``but``."""
    for name, one in model.named_modules():
        if is_linear(one) and but not in name:
            weight: Any = one.weight
            weight.masked_fill_(~P24.best(weight.abs().float()), 0.0)


def row(shape: tuple[int, int], tokens: int, **changes: Any) -> Row:
    """A row of a table in which 2:4 is twice as fast."""
    size = shape[0] * shape[1]
    facts = {
        "dtype": "bf16",
        "kernel": "cutlass",
        "dense_ms": 2.0,
        "sparse_ms": 1.0,
        "speed_up": (1.9, 2.0, 2.1),
        "dense_bytes": 2 * size,
        "sparse_bytes": 9 * size // 8,
    }
    return Row(out_features=shape[0], in_features=shape[1], tokens=tokens, **{**facts, **changes})
