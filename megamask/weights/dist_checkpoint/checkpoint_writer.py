"""Writes a distributed checkpoint of PyTorch, Megatron's ``torch_dist``, a block at a time.

Megatron's own writer wants all tensors in memory. What is written here it reads as its own: files
of what ``torch.save`` makes of each piece of a tensor, the index ``.metadata``, ``common.pt`` for
what is no tensor, and ``metadata.json``.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from megamask.safe_checkpoint import COMMON, INDEX
from megamask.storage import write_json
from megamask.weights.dist_checkpoint.checkpoint_folder import BACKEND, FORMAT
from megamask.weights.file_stream import FileStream, Streamed

FILE_BYTES = 5 * 10**9
END_OF_DATA, ENTRY = b"PK\x07\x08", b"PK\x01\x02"  # signatures in a zip archive


@dataclass(frozen=True)
class Written:
    """A piece in a file.

    Attributes:
        key: name of the tensor or object.
        file: name of the file.
        start, length: bytes of the file.
        offsets: place of the first number of the piece in the tensor; None for an object.
        sizes: shape of the piece.
        whole: shape of the tensor.
        dtype: of the tensor.
    """

    key: str
    file: str
    start: int
    length: int
    offsets: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass
class CheckpointWriter:
    """Writes the files of a rank. The object is a context manager, whose end completes them.

    Attributes:
        folder: where they go; it holds no checkpoint.
        rank: number of the process, for the names of files.
        file_bytes: after so many bytes the next file begins.
        written: what was written.
    """

    folder: Path
    rank: int = 0
    file_bytes: int = FILE_BYTES
    written: list[Written] = field(default_factory=list)
    _file: FileStream | None = None
    _count: int = 0
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def add(
        self,
        key: str,
        offsets: tuple[int, ...],
        size: tuple[int, ...],
        piece: Tensor | Streamed,
        seen: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Write a piece of a tensor.

        Args:
            key: name of the tensor.
            offsets: place of the first number of the piece.
            size: shape of the whole tensor.
            piece: its numbers.
            seen: see ``FileStream.put``.
        """
        numbers, file = Streamed.of(piece), self._next_file()
        start, checksum = file.tell(), 0
        head, tail = _archive(numbers.shape, numbers.dtype)

        def look(stored: Tensor) -> None:
            nonlocal checksum
            checksum = zlib.crc32(stored.view(torch.uint8).numpy().data, checksum)
            if seen is not None:
                seen(stored)

        file.write(head)
        begin = file.tell()
        for block in numbers.blocks():
            file.put(block, numbers.dtype, look)
        assert file.tell() - begin == numbers.nbytes, f"{key} has other rows than its shape says"
        file.write(_with_checksum(tail, checksum))
        length = file.tell() - start
        where = (self._name(), start, length, offsets, numbers.shape, size, numbers.dtype)
        self.written.append(Written(key, *where))

    def add_state(self, key: str) -> None:
        """Write an empty extra state."""
        state = io.BytesIO()
        torch.save([None], state)
        file = self._next_file()
        start = file.tell()
        file.write(state.getvalue())
        self.written.append(Written(key, self._name(), start, file.tell() - start))

    def _next_file(self) -> FileStream:
        """The file that takes the next piece."""
        if self._file is not None and self._file.tell() >= self.file_bytes:
            self._open.close()
            self._file, self._count = None, self._count + 1
        if self._file is None:
            self._file = self._open.enter_context(FileStream(self.folder / self._name()))
        return self._file

    def _name(self) -> str:
        return f"__{self.rank}_{self._count}.distcp"


def write_index(folder: Path, written: list[Written], common: Mapping[str, Any]) -> None:
    """Write what makes files a checkpoint.

    Args:
        folder: with the files.
        written: the pieces of all ranks.
        common: what is no tensor.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    index = Metadata({}, storage_data={})
    for piece in sorted(written, key=lambda piece: (piece.key, piece.offsets or ())):
        offsets = None if piece.offsets is None else torch.Size(piece.offsets)
        if offsets is None:
            index.state_dict_metadata[piece.key] = BytesStorageMetadata()
        else:
            about = TensorProperties(piece.dtype)
            new = TensorStorageMetadata(about, torch.Size(piece.whole), [])
            entry = index.state_dict_metadata.setdefault(piece.key, new)
            assert isinstance(entry, TensorStorageMetadata)
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
        index.storage_data[MetadataIndex(piece.key, offsets)] = _StorageInfo(
            piece.file, piece.start, piece.length
        )
    with (folder / INDEX).open("wb") as file:
        pickle.dump(index, file)
    torch.save(dict(common), folder / COMMON)
    backends = {"sharded_backend": BACKEND, "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    write_json(folder / FORMAT, backends | versions)


@lru_cache(maxsize=64)
def _archive(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the numbers of a tensor, whose checksum is 0."""
    sink: Any = _Sink()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), sink)
    return bytes(sink.head), bytes(sink.tail)


class _Sink:
    """A file that keeps what is written before and after the numbers, which are skipped."""

    def __init__(self) -> None:
        self.head, self.tail, self._skipped = bytearray(), bytearray(), 0

    def write(self, data: Any) -> int:
        (self.tail if self._skipped else self.head).extend(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_CUR and not self._skipped
        self._skipped = offset
        return self.tell()

    def tell(self) -> int:
        return len(self.head) + self._skipped + len(self.tail)

    def flush(self) -> None:
        """Nothing waits."""


def _with_checksum(tail: bytes, checksum: int) -> bytes:
    """The end of an archive with the checksum (CRC-32) of its numbers: in the descriptor behind
    them, and in their entry of the list at the end.
    """
    if not tail.startswith(END_OF_DATA):  # a tensor without numbers, which nothing skips
        return tail
    found, at = bytearray(tail), tail.find(ENTRY)
    while not found[at + 46 :].startswith(b"archive/data/0"):
        lengths = struct.unpack_from("<HHH", found, at + 28)  # of name, extra field and comment
        at += 46 + sum(lengths)
        assert found[at : at + 4] == ENTRY, "torch.save writes another archive than is known here"
    struct.pack_into("<I", found, 4, checksum)
    struct.pack_into("<I", found, at + 16, checksum)
    return bytes(found)
