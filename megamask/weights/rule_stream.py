"""A Megatron tensor, or a shard of it, made block by block from the files of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.weights.file_stream import Streamed, row_blocks
from megamask.weights.rule import Piece, Rule
from megamask.weights.source import FINITE, Blocks, all_finite, not_finite


def streamed_shard(
    reader: Blocks,
    rule: Rule,
    dtype: torch.dtype,
    tp_rank: int = 0,
    tp: int = 1,
    rows: slice = slice(None),
) -> Streamed:
    """Some rows of ``rule.shard``.

    Args:
        reader: the HF tensors.
        rule: of the Megatron tensor.
        dtype: of the result.
        tp_rank, tp: the tensor-parallel rank, and the number of ranks.
        rows: of the shard.
    """
    height, *rest = rule.shape(tp)
    shape = (len(range(*rows.indices(height))), *rest)
    pieces = rule.pieces(tp_rank, tp, rows)
    return Streamed(shape, dtype, partial(_blocks, reader, pieces, tuple(rest), dtype))


def _blocks(
    reader: Blocks, pieces: list[Piece], row: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The rows of the pieces, read some at a time; ``row`` is the shape of a row."""
    for piece in pieces:
        count = piece.rows.stop - piece.rows.start
        for rows in row_blocks((count, *row), dtype, piece.rows.start):
            if piece.hf is None:
                yield torch.zeros(rows.stop - rows.start, *row, dtype=dtype)
            else:
                yield reader.read(piece.hf, rows, piece.cols)


def finite_check(reader: Blocks, rule: Rule, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """A function that refuses a stored block whose numbers are not all finite, and names the HF
    tensor. The arguments are those of ``streamed_shard``.
    """

    def check(stored: Tensor) -> None:
        if all_finite(stored):
            return
        for name in rule.hf:
            tensor = reader.read(name, slice(0, reader.shape(name)[0]))
            if problem := not_finite(name, tensor, tensor.to(dtype)):
                raise ArtifactError(reader.folder, problem, FINITE)
        problem = f"held other numbers in {', '.join(rule.hf)} a moment ago"
        raise ArtifactError(reader.folder, problem, "Run the command again.")

    return check
