"""Weights on disk under their Hugging Face (HF) names, whatever format the files have."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from torch import Tensor

Self = TypeVar("Self")


class WeightSource(Protocol):
    """The tensors of a model, read block by block, weights of linears as (O, I). A source is a
    context manager.
    """

    @property
    def folder(self) -> Path:
        """The folder of the files, for messages."""

    def names(self) -> list[str]:
        """All HF names."""

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """A block of a tensor, ``cols`` along the last axis: a ``Read`` for the mapping table."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""

    def __enter__(self: Self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def some_of(names: list[str]) -> str:
    """The first names of a list and the number of the others, for messages."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
