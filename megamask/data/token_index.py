"""The index of a Megatron indexed dataset (``.idx``): written, and read and checked before anything
trusts it.

Megatron's own reader takes counts, lengths and pointers as they come, so a torn or hostile file
ends it with a segmentation fault, with an endless loop, or by asking for all memory. Nothing here
copies more than ``CHUNK`` entries at a time.

The file holds, little-endian: magic (9 bytes), version (u64), code of the token type (u8), number
of sequences N (u64), number of document bounds D (u64), lengths in tokens (N i32), pointers in
bytes (N i64), document bounds (D i64), and for multimodal data modes (N i8).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamask.errors import ArtifactError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Code -> type of a token, for the integer types among Megatron's codes.
TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CHUNK = 2**20


@dataclass(frozen=True)
class TokenIndex:
    """A checked index; the arrays are mapped from disk.

    Attributes:
        prefix: the path of the dataset without ``.bin`` and ``.idx``.
        dtype: the type of a token.
        lengths: tokens of each sequence, int32 (N,).
        pointers: place of each sequence in the ``.bin`` file, in bytes, int64 (N,).
        bounds: number of the first sequence of each document, and N at the end, int64 (D,).
        tokens: the sum of the lengths.
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    bounds: NDArray[np.int64]
    tokens: int

    def all_tokens(self) -> NDArray[Any]:
        """The content of the ``.bin`` file, mapped from disk, one-dimensional."""
        file = bin_file(self.prefix)
        if not file.stat().st_size:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(file, dtype=self.dtype, mode="r")

    def sequence(self, tokens: NDArray[Any], number: int) -> NDArray[Any]:
        """The tokens of a sequence, a view of ``tokens``, which :meth:`all_tokens` returned."""
        first = int(self.pointers[number]) // self.dtype.itemsize
        return tokens[first : first + int(self.lengths[number])]


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The type of a token: that of Megatron's ``DType.optimal_dtype``, whose module is not asked,
    because its import takes two seconds.

    Args:
        vocab_size: a number that is larger than every id.
    """
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_file(prefix: Path) -> Path:
    """The file of the tokens of a dataset."""
    return prefix.with_name(prefix.name + ".bin")


def idx_file(prefix: Path) -> Path:
    """The file of the index of a dataset."""
    return prefix.with_name(prefix.name + ".idx")


def write_index(prefix: Path, dtype: np.dtype[Any], lengths: NDArray[np.int32]) -> None:
    """Write the index of a dataset whose documents are one sequence each, without gaps, with the
    bytes of Megatron's ``IndexedDatasetBuilder``.

    Args:
        prefix: the path of the dataset without ``.bin`` and ``.idx``.
        dtype: the type of a token.
        lengths: tokens of each document, (N,), in the order of the ``.bin`` file.
    """
    code = next(code for code, name in TOKEN_TYPES.items() if name == dtype.name)
    count, end = len(lengths), 0
    with idx_file(prefix).open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        for start in range(0, count, CHUNK):
            stream.write(lengths[start : start + CHUNK].astype("<i4").tobytes())
        for start in range(0, count, CHUNK):
            ends = end + np.cumsum(lengths[start : start + CHUNK], dtype=np.int64) * dtype.itemsize
            stream.write(np.concatenate([[end], ends[:-1]]).astype("<i8").tobytes())
            end = int(ends[-1])
        for start in range(0, count + 1, CHUNK):
            bounds = np.arange(start, min(start + CHUNK, count + 1))
            stream.write(bounds.astype("<i8").tobytes())


def read_index(prefix: Path, fix: str) -> TokenIndex:
    """Read and check the index of a dataset.

    Args:
        prefix: the path of the dataset without ``.bin`` and ``.idx``.
        fix: the next action of the user, for the message.

    Raises:
        ArtifactError: a file is missing, or the index is not of Megatron's format, contradicts its
            own size, or points outside of the ``.bin`` file.
    """
    file = idx_file(prefix)
    try:
        bin_size = bin_file(prefix).stat().st_size
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(HEADER.size)
    except OSError as error:
        where = error.filename or file
        raise ArtifactError(where, f"cannot be read ({error.strerror})", fix) from error

    def broken(problem: str) -> ArtifactError:
        return ArtifactError(file, f"is no usable index of tokens: {problem}", fix)

    if len(head) < HEADER.size:
        raise broken(f"it has {size} bytes, its header alone has {HEADER.size}")
    magic, version, code, sequences, bounds = HEADER.unpack(head)
    if magic != MAGIC:
        raise broken("it does not begin with the magic bytes of Megatron's indexed datasets")
    if version != 1:
        raise broken(f"it has version {version}, known is version 1")
    if code not in TOKEN_TYPES:
        known = ", ".join(f"{key} ({name})" for key, name in TOKEN_TYPES.items())
        raise broken(f"it has the token type {code}, known are {known}")
    lengths_at = HEADER.size
    pointers_at = lengths_at + 4 * sequences
    bounds_at = pointers_at + 8 * sequences
    end = bounds_at + 8 * bounds
    if size not in (end, end + sequences):
        counts = f"{sequences} sequences and {bounds} document bounds"
        raise broken(f"it has {size} bytes, {counts} need {end}")
    dtype = np.dtype(TOKEN_TYPES[code])
    if bin_size % dtype.itemsize:
        raise broken(f"the .bin file has {bin_size} bytes, no whole number of {dtype.name}")
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    lengths = mapped[lengths_at:pointers_at].view(np.int32)
    pointers = mapped[pointers_at:bounds_at].view(np.int64)
    of_documents = mapped[bounds_at:end].view(np.int64)
    tokens = _checked_tokens(lengths, pointers, dtype.itemsize, bin_size, broken)
    _check_bounds(of_documents, sequences, broken)
    return TokenIndex(prefix, dtype, lengths, pointers, of_documents, tokens)


def _checked_tokens(
    lengths: NDArray[np.int32],
    pointers: NDArray[np.int64],
    width: int,
    bin_size: int,
    broken: Callable[[str], ArtifactError],
) -> int:
    """The sum of the lengths, after a check that every sequence lies within the ``.bin`` file."""
    tokens = 0
    for start in range(0, len(lengths), CHUNK):
        long = lengths[start : start + CHUNK].astype(np.int64)
        at = pointers[start : start + CHUNK]
        # A length is below 2^31 and a pointer at most the size of a file, so no sum overflows.
        outside = (long < 0) | (at < 0) | (at > bin_size)
        outside |= (at + long * width > bin_size) | (at % width != 0)
        if outside.any():
            number = start + int(outside.argmax())
            place = f"{lengths[number]} tokens at byte {pointers[number]}"
            raise broken(f"sequence {number} has {place}, the .bin file has {bin_size} bytes")
        tokens += int(long.sum())
    return tokens


def _check_bounds(
    bounds: NDArray[np.int64], sequences: int, broken: Callable[[str], ArtifactError]
) -> None:
    """Check that the document bounds rise from 0 to the number of sequences."""
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != sequences:
        raise broken(f"its document bounds do not run from 0 to {sequences}")
    for start in range(0, len(bounds) - 1, CHUNK):
        part = bounds[start : start + CHUNK + 1]
        if (part[1:] < part[:-1]).any():
            raise broken("its document bounds fall")
