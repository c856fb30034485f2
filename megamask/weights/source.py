"""Weights on disk under their Hugging Face (HF) names, whatever format the files have."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self")
FINITE = "Repair the model, or set torch_dtype in its config.json to a dtype that holds them."


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


def not_finite(name: str, tensor: Tensor, stored: Tensor) -> str:
    """What is wrong with a tensor as it was stored; empty if all of its numbers are finite.

    Args:
        name: what users call the tensor.
        tensor: as the file holds it.
        stored: the same numbers in the dtype in which they are kept.
    """
    bad = int((~torch.isfinite(stored)).sum())
    if not bad:
        return ""
    in_file = int((~torch.isfinite(tensor)).sum())
    if in_file:
        return f"{name} holds {in_file:,} numbers that are not finite"
    dtype = str(stored.dtype).removeprefix("torch.")
    return f"{name} holds {bad:,} numbers that are too large for {dtype}, the dtype of config.json"
