"""One entry of the mapping table: a Megatron tensor and the Hugging Face tensors it is made of, in
both directions and at any TP.

Every function works on any tensor whose first axis runs along out_features and whose last axis runs
along in_features: weights (O, I), biases (O,), masks (O, I), candidate indices (O, G), mask logits
(O, C, G). G groups per row, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["replicate", "vocab", "column", "row", "qkv", "gated"]

Read = Callable[[str, slice, "slice | None"], Tensor]
"""``read(hf_name, rows, cols)``: that block of an HF tensor. ``cols`` (last axis) is None when all of it is wanted."""


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor.

    Args:
        megatron: name in the state dict of a GPTModel.
        hf: names of the HF tensors, in the order in which they are fused.
        kind: how it is sharded and fused. ``replicate``: whole on every rank. ``column``,
            ``vocab``: rows split. ``row``: last axis split. ``qkv``: rows split, and interleaved
                per KV group as [its queries; key; value]. ``gated``: rows split,
            each rank holds [its gate; its up].
        shapes: shapes of the HF tensors.
        is_linear: a linear's weight that may be pruned.
        kv_groups: KV groups of a ``qkv`` tensor.
        padded_rows: rows of a ``vocab`` tensor in Megatron; rows beyond those of the HF tensor are
            zeros.
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
        """Shape of one rank's Megatron tensor."""
        rows, rest = sum(self._rows(1)), self.shapes[0][1:]
        if self.kind == "replicate":
            return (rows, *rest)
        if self.kind == "row":
            return (rows, *rest[:-1], _share(rest[-1], tp))
        return (_share(rows, tp), *rest)

    def shard(self, read: Read, tp_rank: int, tp: int, group: int = 1) -> Tensor:
        """The Megatron tensor of one rank, reading only what it needs.

        Args:
            read: gives a block of an HF tensor (weight, mask, indices or logits of that name).
            tp_rank: the rank.
            tp: number of ranks.
            group: weights per entry of the last axis: 1 for weights and masks, m for indices and
                logits.
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
        counts = self._rows(tp)
        return self._fuse(
            [
                read(name, slice(tp_rank * n, (tp_rank + 1) * n), None)
                for name, n in zip(self.hf, counts, strict=True)
            ],
            tp,
        )

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The full (TP = 1) Megatron tensor from those of all ranks, in rank order."""
        if self.kind == "replicate":
            return shards[0]
        if self.kind == "row":
            return torch.cat(list(shards), dim=-1)
        tp = len(shards)
        parts = zip(*(self._split(shard, tp) for shard in shards), strict=True)
        return self._fuse([torch.cat(part) for part in parts], 1)

    def to_hf(self, full: Tensor) -> dict[str, Tensor]:
        """The HF tensors of a full (TP = 1) Megatron tensor. Padding of the vocabulary is cut
        off.
        """
        if self.kind == "vocab":
            return {self.hf[0]: full[: self.shapes[0][0]]}
        return dict(zip(self.hf, self._split(full, 1), strict=True))

    def to_megatron(self, hf: Mapping[str, Tensor]) -> Tensor:
        """The full (TP = 1) Megatron tensor from whole HF tensors."""
        return self.shard(lambda name, rows, cols: block(hf[name], rows, None), 0, 1)

    def _rows(self, tp: int) -> list[int]:
        """Rows of each part on one rank."""
        if self.kind == "vocab":
            return [_share(self.padded_rows or self.shapes[0][0], tp)]
        split = 1 if self.kind in ("replicate", "row") else tp
        return [_share(shape[0], split) for shape in self.shapes]

    def _interleaved(self, tp: int) -> int:
        return _share(self.kv_groups, tp) if self.kind == "qkv" else 1

    def _fuse(self, parts: Sequence[Tensor], tp: int) -> Tensor:
        groups = self._interleaved(tp)
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def _split(self, fused: Tensor, tp: int) -> list[Tensor]:
        groups = self._interleaved(tp)
        widths = [_share(rows, groups) for rows in self._rows(tp)]
        return [
            part.flatten(0, 1) for part in fused.unflatten(0, (groups, -1)).split(widths, dim=1)
        ]

    def _shard_vocab(self, read: Read, tp_rank: int, count: int) -> Tensor:
        start, total = tp_rank * count, self.shapes[0][0]
        if start >= total:  # nothing but padding; one row is read for its dtype and width
            return torch.zeros_like(read(self.hf[0], slice(0, 1), None)).repeat_interleave(
                count, dim=0
            )
        rows = read(self.hf[0], slice(start, min(start + count, total)), None)
        missing = count - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def block(tensor: Tensor, rows: slice, cols: slice | None) -> Tensor:
    """That block of a tensor in memory: what a ``Read`` gives."""
    return tensor[rows] if cols is None else tensor[rows, ..., cols]


def _share(total: int, parts: int) -> int:
    assert total % parts == 0, f"{total} does not split into {parts}: check_tp comes first"
    return total // parts
