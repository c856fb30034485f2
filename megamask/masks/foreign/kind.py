"""A kind of file or folder of another tool that holds masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.sparsity.pattern import Pattern
from megamask.weights.family import Architecture
from megamask.weights.file_layout import FileLayout, file_layout
from megamask.weights.mapping import linear_shapes
from megamask.weights.source import WeightSource

FIX = "Name the base model that the masks were made for, or download the masks again."
SAFE = "Use masks from somebody you trust, saved as plain tensors."


@dataclass(frozen=True)
class Base:
    """The base model of foreign masks.

    Attributes:
        arch: its architecture.
        weights: its tensors.
        plan: the pattern that the mask of each linear must have.
        ignore_keys: see ``read_architecture``.
    """

    arch: Architecture
    weights: WeightSource
    plan: Mapping[str, Pattern]
    ignore_keys: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HF module name -> (O, I) of every prunable linear."""
        return linear_shapes(self.arch)

    @cached_property
    def layout(self) -> FileLayout:
        """How files of such a model hold the tensors."""
        return file_layout(self.arch)

    def turned(self, name: str, mask: Tensor) -> Tensor:
        """The mask (O, I) of a linear, from the mask as files hold its weight."""
        return mask.t() if f"{name}.weight" in self.layout.transposed else mask

    def shape_in_files(self, name: str) -> tuple[int, ...]:
        """The shape in which files hold the weight of a linear."""
        shape = self.shapes[name]
        return shape[::-1] if f"{name}.weight" in self.layout.transposed else shape


@dataclass(frozen=True)
class Kind:
    """A kind of foreign masks.

    Attributes:
        name: of the kind, as the header of the mask file keeps it.
        what: a noun with its form, for messages.
        fits: whether a path is of this kind, by its name and the names of its parts.
        read: yields HF module name and mask (O, I), True = keep, of each linear that has a mask.
            It raises ArtifactError where the path is damaged or does not fit the base model.
    """

    name: str
    what: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, Base], Iterator[tuple[str, Tensor]]]


def checked_mask(path: Path, name: str, numbers: Tensor, base: Base) -> Tensor:
    """The mask (O, I) of a linear, from a tensor of zeros and ones of any dtype.

    Args:
        path: the file, for messages.
        name: of the linear.
        numbers: the tensor, as files hold the weight.
        base: the base model.

    Raises:
        ArtifactError: the tensor has another shape, or holds other numbers.
    """
    wanted = base.shape_in_files(name)
    if tuple(numbers.shape) != wanted:
        problem = f"holds a mask of {name} of shape {tuple(numbers.shape)}, not {wanted}"
        raise ArtifactError(path, problem, FIX)
    mask = numbers != 0
    if numbers.dtype != torch.bool and not torch.equal(numbers, mask.to(numbers.dtype)):
        problem = f"holds other numbers than 0 and 1 in the mask of {name}"
        raise ArtifactError(path, problem, FIX)
    return base.turned(name, mask)
