"""Look-ups of many small numbers in a table, on the CPU."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE = 1 << 15  # numbers that are looked up at a time
MOST = 16  # bytes of an entry that numpy copies at once

Numbers = npt.NDArray[np.unsignedinteger]


def smallest_dtype(largest: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned dtype that holds ``largest``. ``np.min_scalar_type`` may answer with
    the C type of another name, which is as wide and which PyTorch does not know.
    """
    return np.dtype(f"u{np.min_scalar_type(largest).itemsize}")


def look_up(table: npt.NDArray[Any], at: Numbers) -> npt.NDArray[Any]:
    """``table[at]`` in half the time, for a table with an entry for every number of the dtype of
    ``at``: no bounds are checked, and numpy's own index type is made in the cache, in pieces.

    Args:
        table: (numbers, …); an entry may be an array.
        at: of any shape.
    """
    assert len(table) == 2 ** (8 * at.itemsize)
    flat = at.reshape(-1)
    found = np.empty((flat.size, *table.shape[1:]), dtype=table.dtype)
    places = np.empty(min(PIECE, flat.size), dtype=np.intp)
    for first in range(0, flat.size, PIECE):
        piece = flat[first : first + PIECE]
        place = places[: len(piece)]
        place[:] = piece
        table.take(place, axis=0, out=found[first : first + PIECE], mode="wrap")
    return found.reshape(*at.shape, *table.shape[1:])


def padded(table: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A table for ``look_up`` by numbers of ``dtype``: zeros follow its entries."""
    whole = np.zeros((2 ** (8 * np.dtype(dtype).itemsize), *table.shape[1:]), dtype=table.dtype)
    whole[: len(table)] = table
    return whole


class MaskTable:
    """The masks of all candidates of a pattern, to be looked up by candidate; those of two groups
    at a time where their candidates are a byte each and their weights at most 16.

    Args:
        masks_CM: the mask of every candidate, (C, M), at most 2**16 of them.
    """

    def __init__(self, masks_CM: npt.NDArray[np.bool_]) -> None:
        self._count, self._m = masks_CM.shape
        self._dtype = smallest_dtype(self._count - 1)
        self._one = padded(masks_CM, self._dtype)

    def masks(self, index_OG: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """The mask (..., I) of candidate indices (..., G) of any integer dtype."""
        assert index_OG.size == 0 or (index_OG.min() >= 0 and index_OG.max() < self._count)
        index = np.ascontiguousarray(index_OG, dtype=self._dtype)
        if index.itemsize == 1 and 2 * self._m <= MOST and index.size % 2 == 0:
            found = look_up(self._two, index.reshape(-1).view(np.uint16))
        else:
            found = look_up(self._one, index)
        return found.reshape(*index_OG.shape[:-1], index_OG.shape[-1] * self._m)

    @cached_property
    def _two(self) -> npt.NDArray[np.bool_]:
        both = np.arange(2**16, dtype=np.uint16).view(np.uint8)
        return self._one[both].reshape(2**16, 2 * self._m)
