"""Masks as differences from magnitude: a reader has the frozen weights, and a mask mostly keeps
the largest weights of a group.

The magnitudes are those of the weights in bf16. Their bits, read as an integer, are nearly their
logarithm (128 an octave), so a difference of two integers is the logarithm of a ratio. A group's
symbol is the candidate index of the *ranks* that are kept, 0 for the n largest; among equal
magnitudes the earlier position counts as larger. The context of a symbol is made of the gap between
the n-th and the next magnitude, the gaps on either side of it, and the n-th magnitude against the
mean of the linear. Each context has frequencies that follow the groups before it, and rANS (Duda,
arXiv:1311.2540) writes the symbols. A linear needs nothing of another.

Shapes: O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megamask.masks.codec import Words
from megamask.masks.radix import Index
from megamask.sparsity.pattern import MAX_CANDIDATES, TABLE_BITS, Pattern

MIDDLE = (8, 20, 40, 64, 100, 150, 250)  # gaps at which a new class begins, in 1/128 octave
SIDE = (20, 60, 150)
LEVEL = (-128, -50, 0, 50, 128)
PER_WORD = 4  # words of 16 bits in a word of 64

Keys = npt.NDArray[np.uint16]


def has_model(pattern: Pattern) -> bool:
    """Whether groups of this pattern can be told from their weights: up to 256 candidates and M up
    to 16, so that a table of all groups stays small, and no pairs.
    """
    is_small = pattern.num_candidates <= MAX_CANDIDATES and pattern.m <= TABLE_BITS
    return is_small and pattern.unit == 1


def keys_of(weight_OI: Tensor) -> Keys:
    """Magnitudes of a weight of any floating-point dtype as integers, (O, I): its bf16 bits without
    the sign. Copies in bf16, fp32 and fp64 give the same; a copy in fp16 may not.
    """
    bits = weight_OI.detach().to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
    return np.bitwise_and(bits.view(np.uint16), np.uint16(0x7FFF))


def encode(index: Index, keys_OI: Keys, pattern: Pattern) -> Words:
    """The words of candidate indices (O * G,), given the magnitudes of the weights."""
    from megamask.masks import ranked_numba as kernels

    context, order = _contexts(keys_OI, pattern)
    table = _tables(pattern)
    symbols = np.empty(len(index), np.uint8)
    typed = np.ascontiguousarray(index, dtype=np.uint8)
    if order.ndim == 1:
        kernels.look_up(table.ranks_of_four, order, typed, symbols)
    else:
        kernels.to_ranks(typed, order, table.positions, table.index_of_bits, symbols)
    first, size = np.empty(len(index), np.uint16), np.empty(len(index), np.uint16)
    out = np.zeros(len(index) + 2 * kernels.STATES + PER_WORD, np.uint16)
    start = kernels.encode(symbols, context, *_state(pattern), first, size, out[:-PER_WORD])
    used = len(out) - PER_WORD - start
    return out[start : start + used + -used % PER_WORD].copy().view(np.uint64)


def decode(words: Words, keys_OI: Keys, pattern: Pattern) -> Index:
    """Candidate indices (O * G,) uint8, given the magnitudes of the weights.

    Raises:
        ValueError: the words are none of ``encode``, or the weights are not those of the mask. Not
            every other weight is noticed here: compare a checksum of the mask.
    """
    from megamask.masks import ranked_numba as kernels

    context, order = _contexts(keys_OI, pattern)
    table = _tables(pattern)
    symbols = np.empty(len(context), np.uint8)
    halves = np.ascontiguousarray(words).view(np.uint16)
    read = kernels.decode(halves, context, *_state(pattern), symbols)
    if read < 0 or len(words) != -(-read // PER_WORD) or halves[read:].any():
        raise ValueError("its words do not fit the weights of the base model")
    index = np.empty(len(context), np.uint8)
    if order.ndim == 1:
        kernels.look_up(table.positions_of_four, order, symbols, index)
    else:
        kernels.to_positions(symbols, order, table.ranks, table.index_of_bits, index)
    return index


class _Tables:
    """Candidates of a pattern: ``ranks`` (C, n) uint8, the kept places; ``positions`` (C, m) bool;
    ``index_of_bits``, the candidate of a number with a bit for each kept place. For m = 4 also
    ``positions_of_four`` and ``ranks_of_four`` (256, C) uint8: for each order of a group, packed in
    a byte, the candidate of positions that is a candidate of ranks, and the inverse.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.ranks = np.array(pattern.kept_positions, dtype=np.uint8)
        self.positions = pattern.candidates(torch.bool).numpy()
        self.index_of_bits = np.zeros(2**pattern.m, dtype=np.uint8)
        places = (1 << self.ranks.astype(np.int64)).sum(1)
        self.index_of_bits[places] = np.arange(pattern.num_candidates, dtype=np.uint8)
        if pattern.m == 4:
            self.positions_of_four, self.ranks_of_four = self._of_four()

    def _of_four(self) -> tuple[Any, Any]:
        symbols = np.arange(len(self.ranks), dtype=np.uint8)
        positions, ranks = np.zeros((2, 256, len(symbols)), dtype=np.uint8)
        for order in permutations(range(4)):
            packed = sum(position << 2 * rank for rank, position in enumerate(order))
            bits = (1 << np.array(order)[self.ranks]).sum(1)
            positions[packed] = self.index_of_bits[bits]
            ranks[packed, positions[packed]] = symbols
        return positions, ranks


@cache
def _tables(pattern: Pattern) -> _Tables:
    return _Tables(pattern)


def _contexts(keys_OI: Keys, pattern: Pattern) -> tuple[Any, Any]:
    """Context (O * G,) and order of all groups: (O * G, m), or packed (O * G,) for m = 4."""
    from megamask.masks import ranked_numba as kernels

    groups, keys = keys_OI.size // pattern.m, np.ascontiguousarray(keys_OI).reshape(-1)
    context, bounds = np.empty(groups, np.uint16), (MIDDLE, SIDE, LEVEL)
    if pattern.m == 4:
        order = np.empty(groups, np.uint8)
        kernels.contexts_of_four(keys, pattern.n, bounds, context, order)
    else:
        order = np.empty((groups, pattern.m), np.uint8)
        kernels.contexts(keys, pattern.n, pattern.m, bounds, context, order)
    return context, order


def _state(pattern: Pattern) -> tuple[Any, Any, Any, int]:
    """Counts, parents and frequencies of no group yet, and contexts with a parent in common."""
    children = (len(SIDE) + 1) ** 2 * (len(LEVEL) + 1)
    parents = len(MIDDLE) + 1
    from megamask.masks.ranked_numba import FEW

    symbols = pattern.num_candidates
    return (
        np.zeros((parents * children, symbols), np.int32),
        np.zeros((parents, symbols), np.int64),
        np.zeros((parents * children, max(symbols, FEW) + 1), np.uint16),
        children,
    )
