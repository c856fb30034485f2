"""PyTorch's kernels for 2:4 weights: which weights they take, and the conversion of a weight.

Two libraries multiply by a weight of which each group of four holds at most two values: CUTLASS and
cuSPARSELt (``torch.sparse.SparseSemiStructuredTensor``). Both keep two values of each group and two
bits for the place of each: 9/16 of the bytes of a dense weight in 16 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
    _semi_structured_conversions,
)

from megamask.sparsity.pattern import Pattern

P24 = Pattern(2, 4)
# Weights in fp32 are taken as 1:2, and those in 8 bits need scales.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = 1024  # of a converted weight that are read back at once
Shape = tuple[int, ...]
NONE_24 = "has no linear whose weights are 2:4: at most two of each four inputs not zero"


@dataclass(frozen=True)
class SparseKernel:
    """A library that multiplies by 2:4 weights.

    Attributes:
        name: of the library.
        kind: PyTorch's class of a converted weight.
        convert: a weight (O, I) -> the converted weight.
    """

    name: str
    kind: Any
    convert: Callable[[Tensor], Any]

    def why_not(self, shape: Shape, dtype: torch.dtype) -> str:
        """Why the kernel takes no weight of this shape and dtype; empty if it does.

        PyTorch's own constants have the divisors.
        """
        if dtype not in DTYPES.values():
            return f"{short(dtype)}: 2:4 kernels take {' and '.join(DTYPES)}"
        limits = self.kind._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
        if limits is None:
            return f"{self.name} takes no {short(dtype)}"
        rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
        if len(shape) != 2 or not all(shape) or shape[0] % rows or shape[1] % columns:
            return f"{self.name} takes multiples of {rows} rows and {columns} columns"
        return ""


def _cutlass(weight_OI: Tensor) -> Any:
    """The weight for CUTLASS, on any device: PyTorch's ``from_dense`` asks for CUDA first."""
    convert: Any = _semi_structured_conversions.sparse_semi_structured_from_dense_cutlass
    packed, meta = convert(weight_OI.detach().contiguous())
    make: Any = SparseSemiStructuredTensorCUTLASS
    parts = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None}
    with _calm():
        return make(weight_OI.shape, packed=packed, meta=meta, **parts)


def _cusparselt(weight_OI: Tensor) -> Any:
    convert: Any = SparseSemiStructuredTensorCUSPARSELT.from_dense
    with _calm():
        return convert(weight_OI.detach().contiguous())


@contextmanager
def _calm() -> Iterator[None]:
    """Without PyTorch's warning that these classes are prototypes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
        yield


KERNELS = {
    kernel.name: kernel
    for kernel in (
        SparseKernel("cusparselt", SparseSemiStructuredTensorCUSPARSELT, _cusparselt),
        SparseKernel("cutlass", SparseSemiStructuredTensorCUTLASS, _cutlass),
    )
}


def short(dtype: torch.dtype) -> str:
    """The name of a dtype as settings have it: ``bf16``."""
    names = {one: name for name, one in DTYPES.items()} | {torch.float32: "fp32"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def is_two_of_four(weight_OI: Tensor) -> bool:
    """Whether each group of four inputs has at most two values other than zero."""
    return weight_OI.dim() == 2 and P24.already_fits(weight_OI)


def dense_again(converted: Any) -> Tensor:
    """The weight (O, I) of a converted weight. CUTLASS's layout is read; cuSPARSELt's is its own
    secret, so the weight is multiplied by the columns of the unit matrix, which is exact.
    """
    if isinstance(converted, SparseSemiStructuredTensorCUTLASS):
        read: Any = _semi_structured_conversions.sparse_semi_structured_to_dense_cutlass
        found: Tensor = read(converted.packed, converted.meta)
        return found
    inputs = converted.shape[1]
    blocks = []
    for first in range(0, inputs, COLUMNS):
        columns = torch.arange(first, min(first + COLUMNS, inputs), device=converted.device)
        unit = torch.zeros(inputs, len(columns), dtype=converted.dtype, device=converted.device)
        unit[columns, columns - first] = 1
        blocks.append(torch.mm(converted, unit))
    return torch.cat(blocks, dim=1)


def is_exact(converted: Any, weight_OI: Tensor) -> bool:
    """Whether a converted weight holds the numbers of the weight, bit for bit. A -0.0 may come back
    as +0.0, which changes no product but the sign of a zero.
    """
    return torch.equal(dense_again(converted), weight_OI)


def bytes_of(weight: Any) -> int:
    """Bytes of a weight, converted or not."""
    parts = [getattr(weight, name, None) for name in ("packed", "meta")]
    stored = [one for one in parts if isinstance(one, Tensor)] or [weight]
    return sum(one.numel() * one.element_size() for one in stored)
