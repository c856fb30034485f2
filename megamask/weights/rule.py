"""An entry of the mapping table between Megatron and Hugging Face (HF) tensors.

A ``Rule`` names a Megatron tensor and the HF tensors that are fused into it, and converts in both
directions at any tensor-parallel size (TP).

Every function works on any tensor whose first axis runs along out_features and whose last axis runs
along in_features: weights (O, I), biases (O,), masks (O, I), candidate indices (O, G), mask logits
(O, L, G). O out_features, I in_features, G groups per row, L logits a group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["replicate", "vocab", "column", "row", "qkv", "gated"]

Read = Callable[[str, slice, "slice | None"], Tensor]
"""``read(hf_name, rows, cols)`` returns a block of an HF tensor.

``cols`` is a slice of the last axis, or None for the whole axis.
"""


@dataclass(frozen=True)
class Piece:
    """Rows of a Megatron tensor that are rows of an HF tensor.

    Attributes:
        hf: name of the HF tensor; None for rows of zeros, which pad the vocabulary.
        rows: of the HF tensor.
        cols: of its last axis; None for the whole axis.
    """

    hf: str | None
    rows: slice
    cols: slice | None


@dataclass(frozen=True)
class Rule:
    """The rule of one Megatron tensor.

    The kinds say how the tensor is sharded and fused:

    - ``replicate``: every rank holds the whole tensor.
    - ``column`` and ``vocab``: the rows are split over the ranks.
    - ``row``: the last axis is split over the ranks.
    - ``qkv``: the rows are split, and interleaved per KV group as [queries; key; value]. Rank r
      holds the r-th of equal pieces, also where a piece is only a part of a KV group.
    - ``gated``: the rows are split, and each rank holds [its part of gate; its part of up].

    Args:
        megatron: name in the state dict of a GPTModel.
        hf: names of the HF tensors, in the order in which they are fused.
        kind: see above.
        shapes: shapes of the HF tensors.
        is_linear: whether the tensor is the weight of a linear that may be pruned.
        kv_groups: number of KV groups of a ``qkv`` tensor.
        parts: rows of each part, where a single HF tensor holds the parts one after another; empty
            where every part is an HF tensor.
        padded_rows: number of rows of a ``vocab`` tensor in Megatron; the rows beyond those of the
            HF tensor are zeros.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    shapes: tuple[tuple[int, ...], ...]
    is_linear: bool = False
    kv_groups: int = 1
    padded_rows: int = 0
    parts: tuple[int, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """HF module names of the tensors (``model.layers.3.self_attn.q_proj``)."""
        return tuple(name.rpartition(".")[0] for name in self.hf)

    def shape(self, tp: int = 1) -> tuple[int, ...]:
        """Shape of the Megatron tensor on each rank."""
        rows, rest = sum(self._part_rows()), self.shapes[0][1:]
        if self.kind == "replicate":
            return (rows, *rest)
        if self.kind == "row":
            return (rows, *rest[:-1], _share(rest[-1], tp))
        return (_share(rows, tp), *rest)

    def shard(self, read: Read, tp_rank: int, tp: int, group: int = 1) -> Tensor:
        """The Megatron tensor of one rank; only the blocks of this rank are read.

        Args:
            read: returns a block of an HF tensor (weight, mask, indices or logits of that name).
            tp_rank: the tensor-parallel rank.
            tp: number of tensor-parallel ranks.
            group: number of weights that an entry of the last axis stands for: 1 for weights and
                masks, m for indices and logits.
        """
        if self.kind == "replicate":
            return read(self.hf[0], slice(0, self.shapes[0][0]), None)
        if self.kind == "row":
            rows, columns = self.shapes[0][0], _share(self.shapes[0][-1], tp * group)
            return read(
                self.hf[0], slice(0, rows), slice(tp_rank * columns, (tp_rank + 1) * columns)
            )
        if self.kind == "vocab":
            return self._shard_vocab(read, tp_rank, _share(self._part_rows()[0], tp))
        if self._splits_groups(tp):
            return self._shard_group(read, tp_rank, tp)
        return self._fuse(self._read_parts(read, tp_rank, tp), self._blocks(tp))

    def pieces(self, tp_rank: int, tp: int, some: slice = slice(None)) -> list[Piece]:
        """What the rows of ``shard`` are, or some of them, from the first to the last."""
        columns: list[slice | None] = [None]

        def numbered(name: str, rows: slice, cols: slice | None) -> Tensor:
            """The numbers of rows, from 1: a row of zeros is then a row that pads."""
            columns[0] = cols
            first = offsets[name] + 1
            return torch.arange(first + rows.start, first + rows.stop)

        starts = [0, *accumulate(shape[0] for shape in self.shapes)]
        offsets = dict(zip(self.hf, starts, strict=False))
        found = []
        for _, row, count in runs(self.shard(numbered, tp_rank, tp)[some]):
            if row == 0:
                found.append(Piece(None, slice(0, count), None))
                continue
            while count:  # rows of two HF tensors may follow one another
                index = bisect_right(starts, row - 1) - 1
                inner = row - 1 - starts[index]
                inside = min(count, self.shapes[index][0] - inner)
                found.append(Piece(self.hf[index], slice(inner, inner + inside), columns[0]))
                row, count = row + inside, count - inside
        return found

    def chunks(self, tp_rank: int, tp: int) -> list[tuple[slice, tuple[int, ...]]]:
        """Where a shard lies in the Megatron tensor of all ranks: the rows of the shard that follow
        one another there, and the place of their first number.
        """
        rows, *rest = self.shape(tp)
        if self.kind == "row":
            return [(slice(0, rows), (*(0,) * len(rest), tp_rank * rest[-1]))]
        zeros = (0,) * len(rest)
        if self.kind != "gated":
            return [(slice(0, rows), (0 if self.kind == "replicate" else tp_rank * rows, *zeros))]
        found, first, whole = [], 0, 0  # each rank holds a share of every part
        for count in self._part_rows():
            share = _share(count, tp)
            found.append((slice(first, first + share), (whole + tp_rank * share, *zeros)))
            first, whole = first + share, whole + count
        return found

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The full (TP = 1) Megatron tensor from the shards of all ranks, in rank order."""
        if self.kind == "replicate":
            return shards[0]
        if self.kind == "row":
            return torch.cat(list(shards), dim=-1)
        if self.kind != "gated":  # each rank holds the next of equal pieces
            return torch.cat(list(shards))
        parts = zip(*(shard.chunk(len(self._part_rows())) for shard in shards), strict=True)
        return torch.cat([torch.cat(part) for part in parts])

    def to_hf(self, full: Tensor) -> dict[str, Tensor]:
        """The HF tensors of a full (TP = 1) Megatron tensor, without padding of the vocabulary."""
        if self.kind == "vocab":
            return {self.hf[0]: full[: self.shapes[0][0]]}
        parts = self._split(full)
        return dict(zip(self.hf, [torch.cat(parts)] if self.parts else parts, strict=True))

    def _part_rows(self) -> tuple[int, ...]:
        """Number of rows of each part in the whole Megatron tensor."""
        if self.kind == "vocab":
            return (self.padded_rows or self.shapes[0][0],)
        return self.parts or tuple(shape[0] for shape in self.shapes)

    def _read_parts(self, read: Read, piece: int, pieces: int) -> list[Tensor]:
        """One of equal pieces of every part."""
        found, first = [], 0
        for index, rows in enumerate(self._part_rows()):
            name, count = self.hf[0 if self.parts else index], _share(rows, pieces)
            start = first + piece * count
            found.append(read(name, slice(start, start + count), None))
            first += rows if self.parts else 0
        return found

    def _blocks(self, tp: int) -> int:
        """Number of blocks of rows, each of which holds a piece of every part."""
        return _share(self.kv_groups, tp) if self.kind == "qkv" else 1

    def _fuse(self, parts: Sequence[Tensor], blocks: int) -> Tensor:
        """Rows of the Megatron tensor from pieces of the parts."""
        pieces = [part.reshape(blocks, -1, *part.shape[1:]) for part in parts]
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def _split(self, full: Tensor) -> list[Tensor]:
        """The parts of a full Megatron tensor: the inverse of ``_fuse``."""
        blocks = self._blocks(1)
        widths = [_share(rows, blocks) for rows in self._part_rows()]
        pieces = torch.split(full.reshape(blocks, -1, *full.shape[1:]), widths, dim=1)
        return [piece.flatten(0, 1) for piece in pieces]

    def _splits_groups(self, tp: int) -> bool:
        """Whether several ranks share a KV group."""
        return self.kind == "qkv" and self.kv_groups < tp

    def _shard_group(self, read: Read, tp_rank: int, tp: int) -> Tensor:
        """A rank's piece of a KV group; the whole group is read."""
        sharers = _share(tp, self.kv_groups)
        group = torch.cat(self._read_parts(read, tp_rank // sharers, self.kv_groups))
        rows = _share(len(group), sharers)
        place = tp_rank % sharers
        return group[place * rows : (place + 1) * rows]

    def _shard_vocab(self, read: Read, tp_rank: int, count: int) -> Tensor:
        """The ``count`` rows of a rank, with zeros for the rows that pad the vocabulary."""
        start, total = tp_rank * count, self.shapes[0][0]
        if start >= total:  # this rank holds only padding; a row is read for its dtype and width
            row = read(self.hf[0], slice(0, 1), None)
            return torch.zeros_like(row).repeat_interleave(count, dim=0)
        rows = read(self.hf[0], slice(start, min(start + count, total)), None)
        missing = count - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def runs(numbers_R: Tensor) -> Iterator[tuple[int, int, int]]:
    """The runs of numbers that grow by one, or are zero: place, first number and length of each.

    Args:
        numbers_R: int64.
    """
    steps = numbers_R[1:] - numbers_R[:-1]
    goes_on = (steps == 1) & (numbers_R[:-1] > 0) | (numbers_R[1:] == 0) & (numbers_R[:-1] == 0)
    starts = [0, *((~goes_on).nonzero().flatten() + 1).tolist(), len(numbers_R)]
    for start, end in pairwise(starts):
        if end > start:
            yield start, int(numbers_R[start]), end - start


def block(tensor: Tensor, rows: slice, cols: slice | None) -> Tensor:
    """A block of a tensor in memory, for a ``Read`` that needs no file."""
    return tensor[rows] if cols is None else tensor[rows, ..., cols]


def _share(total: int, parts: int) -> int:
    assert total % parts == 0, f"{total} does not split into {parts}; check_tp must run before"
    return total // parts
