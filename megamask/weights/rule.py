"""An entry of the mapping table between Megatron and Hugging Face (HF) tensors.

A ``Rule`` names a Megatron tensor and the HF tensors that are fused into it, and converts in both
directions at any tensor-parallel size (TP).

Every function works on any tensor whose first axis runs along out_features and whose last axis runs
along in_features: weights (O, I), biases (O,), masks (O, I), candidate indices (O, G), mask logits
(O, L, G). O out_features, I in_features, G groups per row, L logits a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["replicate", "vocab", "column", "row", "qkv", "gated"]

Read = Callable[[str, slice, "slice | None"], Tensor]
"""``read(hf_name, rows, cols)`` returns a block of an HF tensor.

``cols`` is a slice of the last axis, or None for the whole axis.
"""


@dataclass(frozen=True)
class Rule:
    """The rule of one Megatron tensor.

    The kinds say how the tensor is sharded and fused:

    - ``replicate``: every rank holds the whole tensor.
    - ``column`` and ``vocab``: the rows are split over the ranks.
    - ``row``: the last axis is split over the ranks.
    - ``qkv``: the rows are split, and interleaved per KV group as [queries; key; value].
    - ``gated``: the rows are split, and each rank holds [its part of gate; its part of up].

    Args:
        megatron: name in the state dict of a GPTModel.
        hf: names of the HF tensors, in the order in which they are fused.
        kind: see above.
        shapes: shapes of the HF tensors.
        is_linear: whether the tensor is the weight of a linear that may be pruned.
        kv_groups: number of KV groups of a ``qkv`` tensor.
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

    @property
    def modules(self) -> tuple[str, ...]:
        """HF module names of the tensors (``model.layers.3.self_attn.q_proj``)."""
        return tuple(name.rpartition(".")[0] for name in self.hf)

    def shape(self, tp: int = 1) -> tuple[int, ...]:
        """Shape of the Megatron tensor on each rank."""
        rows, rest = sum(self._rows(1)), self.shapes[0][1:]
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
            return self._shard_vocab(read, tp_rank, self._rows(tp)[0])
        parts = [
            read(name, slice(tp_rank * count, (tp_rank + 1) * count), None)
            for name, count in zip(self.hf, self._rows(tp), strict=True)
        ]
        return self._fuse(parts, tp)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The full (TP = 1) Megatron tensor from the shards of all ranks, in rank order."""
        if self.kind == "replicate":
            return shards[0]
        if self.kind == "row":
            return torch.cat(list(shards), dim=-1)
        tp = len(shards)
        parts = zip(*(self._split(shard, tp) for shard in shards), strict=True)
        return self._fuse([torch.cat(part) for part in parts], 1)

    def to_hf(self, full: Tensor) -> dict[str, Tensor]:
        """The HF tensors of a full (TP = 1) Megatron tensor, without padding of the vocabulary."""
        if self.kind == "vocab":
            return {self.hf[0]: full[: self.shapes[0][0]]}
        return dict(zip(self.hf, self._split(full, 1), strict=True))

    def _rows(self, tp: int) -> list[int]:
        """Number of rows of each HF part on one rank."""
        if self.kind == "vocab":
            return [_share(self.padded_rows or self.shapes[0][0], tp)]
        split = 1 if self.kind in ("replicate", "row") else tp
        return [_share(shape[0], split) for shape in self.shapes]

    def _blocks(self, tp: int) -> int:
        """Number of blocks of rows, each of which holds a piece of every HF part."""
        return _share(self.kv_groups, tp) if self.kind == "qkv" else 1

    def _fuse(self, parts: Sequence[Tensor], tp: int) -> Tensor:
        """A rank's Megatron tensor from its pieces of the HF parts."""
        blocks = self._blocks(tp)
        pieces = [part.reshape(blocks, -1, *part.shape[1:]) for part in parts]
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def _split(self, fused: Tensor, tp: int) -> list[Tensor]:
        """A rank's pieces of the HF parts: the inverse of ``_fuse``."""
        blocks = self._blocks(tp)
        widths = [_share(rows, blocks) for rows in self._rows(tp)]
        pieces = torch.split(fused.reshape(blocks, -1, *fused.shape[1:]), widths, dim=1)
        return [piece.flatten(0, 1) for piece in pieces]

    def _shard_vocab(self, read: Read, tp_rank: int, count: int) -> Tensor:
        """The ``count`` rows of a rank, with zeros for the rows that pad the vocabulary."""
        start, total = tp_rank * count, self.shapes[0][0]
        if start >= total:  # this rank holds only padding; a row is read for its dtype and width
            row = read(self.hf[0], slice(0, 1), None)
            return torch.zeros_like(row).repeat_interleave(count, dim=0)
        rows = read(self.hf[0], slice(start, min(start + count, total)), None)
        missing = count - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def block(tensor: Tensor, rows: slice, cols: slice | None) -> Tensor:
    """A block of a tensor in memory, for a ``Read`` that needs no file."""
    return tensor[rows] if cols is None else tensor[rows, ..., cols]


def _share(total: int, parts: int) -> int:
    assert total % parts == 0, f"{total} does not split into {parts}; check_tp must run before"
    return total // parts
