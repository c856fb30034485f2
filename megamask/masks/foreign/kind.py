"""A kind of file or folder of another tool that holds masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megamask.sparsity.pattern import Pattern
from megamask.weights.source import WeightSource

FIX = "Name the base model that the masks were made for, or download the masks again."


@dataclass(frozen=True)
class Base:
    """The base model of foreign masks.

    Attributes:
        shapes: HF module name -> (O, I) of every prunable linear.
        weights: its tensors.
        pattern: the pattern that every mask must have.
        ignore_keys: see ``read_architecture``.
        transposed: names of weights that lie as (in_features, out_features) in files.
    """

    shapes: dict[str, tuple[int, ...]]
    weights: WeightSource
    pattern: Pattern
    ignore_keys: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Kind:
    """A kind of foreign masks.

    Attributes:
        name: of the kind, as the header of the mask file keeps it.
        what: a noun with its form, for messages.
        fits: whether a path is of this kind, by its name.
        read: yields HF module name and mask (O, I), True = keep, of each linear that has a mask.
            It raises ArtifactError where the path is damaged or does not fit the base model.
    """

    name: str
    what: str
    fits: Callable[[Path], bool]
    read: Callable[[Path, Base], Iterator[tuple[str, Tensor]]]
