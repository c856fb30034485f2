"""The tensors that lie beside the text part of a model, such as those of an image tower."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megamask.weights.file_stream import row_blocks
from megamask.weights.source import WeightSource


class WithOthers:
    """Weights of a text part, with the other tensors of the whole model: a ``WeightSource``.

    Args:
        text: the weights of the text part.
        whole: the whole model.
        others: names of the tensors that ``whole`` has beside the text part.
    """

    def __init__(self, text: WeightSource, whole: WeightSource, others: list[str]) -> None:
        self._text, self._whole, self._others = text, whole, others

    @property
    def folder(self) -> Path:
        """The folder of the text part, for messages."""
        return self._text.folder

    def names(self) -> list[str]:
        """All HF names."""
        return [*self._text.names(), *self._others]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source(name).shape(name)

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """A block of a tensor."""
        return self._source(name).read(name, rows, cols)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._source(name).tensor(name)

    def __enter__(self) -> WithOthers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._text.__exit__(kind, error, trace)
        self._whole.__exit__(kind, error, trace)

    def _source(self, name: str) -> WeightSource:
        return self._whole if name in self._others else self._text


def digest_of(source: WeightSource, names: list[str]) -> str:
    """SHA-256 over names, shapes and all numbers, floats in fp32: equal for copies in bf16 and fp32
    of the same numbers, whatever files and spelling they are in. Blocks of rows are read in turn.

    Args:
        source: the weights.
        names: of the tensors.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        shape = source.shape(name)
        digest.update(f"{name}:{tuple(shape)}".encode())
        dtype = source.read(name, slice(0, 0)).dtype
        for rows in row_blocks(shape, dtype) if shape else [slice(None)]:
            block = source.read(name, rows)
            numbers = block.float() if block.is_floating_point() else block
            digest.update(bytes_of(numbers).numpy().data)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8."""
    return tensor.contiguous().flatten().view(torch.uint8)
