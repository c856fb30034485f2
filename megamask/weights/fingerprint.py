"""The fingerprint of a base model: a cheap hash that tells which model a mask belongs to.

The fingerprint is the same for weights on disk and for a loaded model. It is the SHA-256 over the
prunable linears in the order of their names: name, shape, and the bf16 bytes of a 16 x 16 grid of
evenly spaced elements. The cast to bf16 makes bf16 and fp32 copies of a model agree. An fp16 copy
rounds small values in another way, so the fingerprints of such copies are kept beside the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamask.errors import ArgumentError
from megamask.weights.architecture import Architecture
from megamask.weights.expert_parts import ExpertPart, is_router, modules_of
from megamask.weights.mapping import linear_shapes
from megamask.weights.source import BITS, WeightSource

GRID = 16
TRANSPOSED = "Conv1D"  # class of transformers whose weight is (I, O); known without an import


Row = Callable[[str, int], Tensor]
"""``row(name, index)`` returns a row (I,) of the weight of a linear."""


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprint of a model, and those of its copies in fp16.

    Attributes:
        exact: of the weights as they are.
        float16: of the weights rounded to fp16, straight and by way of bf16. A copy in bf16 or fp32
            of these copies has the same fingerprints.
    """

    exact: str
    float16: tuple[str, ...] = ()


def fingerprint(shapes: Mapping[str, tuple[int, ...]], row: Row) -> str:
    """Hex digest of a model.

    Args:
        shapes: HF module name -> (O, I) of every prunable linear.
        row: reads the weights.
    """
    return _digests(shapes, row, (lambda grid: grid,))[0]


def fingerprints(shapes: Mapping[str, tuple[int, ...]], row: Row) -> Fingerprints:
    """The digest of a model and of its copies in fp16. The arguments are those of
    ``fingerprint``.
    """
    exact, straight, by_bf16 = _digests(
        shapes, row, (lambda grid: grid, torch.Tensor.half, lambda grid: grid.bfloat16().half())
    )
    return Fingerprints(exact, tuple(sorted({straight, by_bf16} - {exact})))


def _digests(
    shapes: Mapping[str, tuple[int, ...]], row: Row, copies: tuple[Callable[[Tensor], Tensor], ...]
) -> list[str]:
    """A digest for each copy of the weights."""
    digests = [hashlib.sha256(b"megamask-fingerprint-v1") for _ in copies]
    for name in sorted(shapes):
        rows, columns = (_spread(size) for size in shapes[name])
        grid = torch.stack([row(name, index).detach()[columns].cpu() for index in rows])
        for digest, copy in zip(digests, copies, strict=True):
            digest.update(f"{name}:{tuple(shapes[name])}".encode())
            digest.update(copy(grid).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return [digest.hexdigest() for digest in digests]


def fingerprints_of(source: WeightSource, arch: Architecture) -> Fingerprints:
    """The fingerprints of weights on disk; 16 rows of each linear are read.

    Args:
        source: the weights.
        arch: their architecture.
    """

    def row(name: str, index: int) -> Tensor:
        return source.read(f"{name}.weight", slice(index, index + 1))[0]

    return fingerprints(linear_shapes(arch), row)


def fingerprint_model(model: nn.Module) -> str:
    """Fingerprint of a transformers model in memory, over all its linears except the head."""
    return fingerprints_model(model).exact


def fingerprints_model(model: nn.Module) -> Fingerprints:
    """As ``fingerprint_model``, with the fingerprints of the copies in fp16.

    Raises:
        ArgumentError: the values of a weight are not at hand: it is offloaded or on the meta
            device, quantized, or divided among ranks.
    """
    linears = model_linears(model)
    for name, linear in linears.items():
        weight = weight_OI(linear).detach()
        is_plain = weight.dtype in BITS and type(weight) is Tensor
        if not is_plain or weight.is_meta:
            how = "offloaded or on the meta device" if weight.is_meta else "quantized or divided"
            allowed = f"a model whose weights are at hand, and {name} is {how}"
            fix = "Load it without quantization_config, device_map and tp_plan."
            raise ArgumentError("fingerprint_model: model", model, allowed, fix)
    shapes = {name: tuple(weight_OI(linear).shape) for name, linear in linears.items()}
    return fingerprints(shapes, lambda name, index: weight_OI(linears[name])[index])


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear: of PyTorch, a ``Conv1D`` of transformers (GPT-2), or a part of
    experts that are held together.
    """
    return isinstance(module, nn.Linear | ExpertPart) or type(module).__name__ == TRANSPOSED


def weight_OI(module: nn.Module) -> Tensor:
    """The weight of a linear, (O, I): the parameter itself, or a view of what a ``Conv1D`` keeps as
    (I, O). What is written to the result is written to the weight.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if type(module).__name__ == TRANSPOSED else weight


def model_linears(model: nn.Module) -> dict[str, Any]:
    """HF module name -> linear, for the prunable linears of a transformers model."""
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    return {
        name: module
        for name, module in modules_of(model)
        if is_linear(module) and module is not head and not is_router(name)
    }


def _spread(size: int) -> list[int]:
    return [index * size // GRID for index in range(GRID)]
