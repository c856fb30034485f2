"""Blocks of tensors of a distributed checkpoint (PyTorch's DCP, Megatron's ``torch_dist``).

The index ``.metadata`` says for every tensor its shape, its dtype and its chunks, and for every
chunk the file, the offset and the length where ``torch.save`` wrote it. Megatron's own reader
unpickles the index and every object of the checkpoint freely, and needs process groups. This reader
takes the index from ``megamask.safe_checkpoint``, never opens objects that are no tensors, such as
the extra state of modules, and reads the rows that it was asked for straight from the file.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import skip_data

from megamask.errors import ArtifactError
from megamask.machine_errors import explained
from megamask.process.open_folder import OpenFolder
from megamask.safe_checkpoint import read_index

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Block = Sequence[range]  # the places of a block along each axis


@dataclass(frozen=True)
class _Chunk:
    """A stored piece of a tensor.

    Attributes:
        name: of the tensor, for messages.
        file: name of the file.
        start, length: bytes of the file that ``torch.save`` wrote.
        offsets, sizes: place of the piece in the tensor, and its shape.
        dtype: of the tensor.
        compressed: whether the bytes were transformed after ``torch.save``.
    """

    name: str
    file: str
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    compressed: bool


class StoredTensors:
    """The tensors of a checkpoint folder. The object is a context manager.

    Verbs replace a folder of weights by renaming a new one to its name. All files are opened in the
    folder that was there at first, so no tensor comes from another one.

    Args:
        folder: the folder with the index.
        fix: what the user can do if the checkpoint is torn.

    Raises:
        ArtifactError: the index is missing, torn or asks for code to be run.
    """

    def __init__(self, folder: Path, fix: str) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder, self._fix = folder, fix
        self._place = OpenFolder(folder)
        index = read_index(folder, fix, with_objects=True)
        self._place.require_there()
        self._stored: Mapping[Any, Any] = index.storage_data
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[str, list[_Chunk]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[_Chunk, int | None] = {}

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor."""
        dtype: torch.dtype = self._tensors[key].properties.dtype
        return dtype

    def read(self, key: str, block: Block) -> Tensor:
        """A block of a tensor, with as many axes as the tensor.

        Raises:
            ArtifactError: the block is not stored as a whole, or a piece is torn.
        """
        parts = [
            (
                chunk,
                [
                    range(max(places.start, first), min(places.stop, first + size))
                    for places, first, size in zip(block, chunk.offsets, chunk.sizes, strict=True)
                ],
            )
            for chunk in self._chunks_of(key)
        ]
        stored = sum(math.prod(map(len, shared)) for _, shared in parts)
        if stored != math.prod(map(len, block)):  # before memory is taken for it
            raise self._torn(f"{key} is not stored as a whole")
        found = torch.empty([len(places) for places in block], dtype=self.dtype(key))
        for chunk, shared in parts:
            if not all(shared):
                continue
            target = found[_slices(shared, [places.start for places in block])]
            self._fill(target, chunk, _slices(shared, chunk.offsets))
        return found

    def _chunks_of(self, key: str) -> list[_Chunk]:
        if key not in self._chunks:
            self._chunks[key] = self._described(key, self._tensors[key])
        return self._chunks[key]

    def _described(self, key: str, entry: TensorStorageMetadata) -> list[_Chunk]:
        """The chunks of a tensor.

        Raises:
            ArtifactError: a chunk lies nowhere, or beyond the tensor.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex

        found = []
        for chunk in entry.chunks:
            piece = self._stored.get(MetadataIndex(key, chunk.offsets))
            bytes_needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            fits = len(chunk.offsets) == len(chunk.sizes) == len(entry.size) and all(
                first + size <= whole
                for first, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            if piece is None or not fits or bytes_needed > piece.length:
                raise self._torn(f"a piece of {key} is missing or lies beyond the tensor")
            found.append(
                _Chunk(
                    key,
                    str(piece.relative_path),
                    piece.offset,
                    piece.length,
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                    entry.properties.dtype,
                    bool(getattr(piece, "transform_descriptors", None)),
                )
            )
        return found

    def _fill(self, target: Tensor, chunk: _Chunk, block: tuple[slice, ...]) -> None:
        """Copy a block of a chunk to ``target``."""
        try:
            self._copy(target, chunk, block)
        except ArtifactError:
            raise
        except Exception as error:  # torch and zipfile raise errors of many types over torn bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise explained(error) or self._torn(f"{chunk.name}: {reason}") from error

    def _copy(self, target: Tensor, chunk: _Chunk, block: tuple[slice, ...]) -> None:
        if chunk not in self._places:
            self._places[chunk] = self._find(chunk)
        place = self._places[chunk]
        if place is None:
            target.copy_(self._load(chunk)[block])
            return
        axis = next((at for at, size in enumerate(chunk.sizes) if size > 1), 0)
        rows = block[axis] if block else slice(0, 1)
        inner = chunk.sizes[axis + 1 :]
        stride = chunk.dtype.itemsize * math.prod(inner)
        shape = (*(1,) * axis, rows.stop - rows.start, *inner) if block else ()
        whole = target.is_contiguous() and tuple(target.shape) == shape
        part = target if whole else torch.empty(shape, dtype=chunk.dtype)
        file = self._open(chunk.file)
        file.seek(place + rows.start * stride)
        into = part.view(-1).view(torch.uint8).numpy()
        if file.readinto(into) != into.nbytes:  # type: ignore[attr-defined]
            raise self._torn(f"{chunk.name} ends early")
        if not whole:
            rest = tuple(slice(None) if at <= axis else one for at, one in enumerate(block))
            target.copy_(part[rest])

    def _find(self, chunk: _Chunk) -> int | None:
        """Position in the file of the first number of a chunk whose numbers follow one another in
        the order of this machine; None for a chunk that PyTorch has to load.

        Raises:
            ArtifactError: the piece holds another tensor than the index says.
        """
        if chunk.compressed:
            raise self._torn(f"{chunk.name} is compressed, which is not read")
        with skip_data():
            plain = self._check(chunk, self._unpickled(chunk))
        if not plain.is_contiguous() or plain.storage_offset() or not plain.numel():
            return None
        with zipfile.ZipFile(self._window(chunk)) as archive:
            data = [
                one for one in archive.infolist() if one.filename.split("/")[1:] == ["data", "0"]
            ]
            order = [one for one in archive.namelist() if one.split("/")[1:] == ["byteorder"]]
            native = not order or archive.read(order[0]).decode("ascii") == sys.byteorder
        if len(data) != 1 or data[0].compress_type != zipfile.ZIP_STORED or not native:
            return None
        header = self._window(chunk)
        header.seek(data[0].header_offset + 26)  # lengths of name and extra field follow
        lengths = header.read(4)
        first = (
            data[0].header_offset
            + 30
            + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
        )
        if first + plain.nbytes > chunk.length or data[0].file_size < plain.nbytes:
            raise self._torn(f"{chunk.name} ends early")
        return chunk.start + first

    def _load(self, chunk: _Chunk) -> Tensor:
        return self._check(chunk, self._unpickled(chunk))

    def _unpickled(self, chunk: _Chunk) -> Any:
        """What ``torch.save`` wrote. Functions that rebuild tensors are admitted, and no others."""
        return torch.load(self._window(chunk), map_location="cpu", weights_only=True)

    def _check(self, chunk: _Chunk, loaded: Any) -> Tensor:
        if (
            not isinstance(loaded, Tensor)
            or loaded.layout != torch.strided
            or tuple(loaded.shape) != chunk.sizes
            or loaded.dtype != chunk.dtype
        ):
            raise self._torn(f"a piece of {chunk.name} is not the tensor that the index describes")
        return loaded.detach()

    def _window(self, chunk: _Chunk) -> io.BufferedReader:
        return io.BufferedReader(_Window(self._open(chunk.file), chunk.start, chunk.length))

    def _open(self, name: str) -> BinaryIO:
        if name not in self._files:
            try:
                self._files[name] = self._place.open(name)
            except FileNotFoundError:
                self._place.require_there()
                raise
        return self._files[name]

    def _torn(self, problem: str) -> ArtifactError:
        return ArtifactError(self.folder, f"is torn ({problem})", self._fix)


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning of a piece")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        left = max(self._length - self._at, 0)
        target = memoryview(buffer).cast("B")[:left]
        self._file.seek(self._start + self._at)
        count = int(self._file.readinto(target))  # type: ignore[attr-defined]
        self._at += count
        return count


def _slices(places: Block, firsts: Sequence[int]) -> tuple[slice, ...]:
    """The slices of ``places`` in a tensor whose first numbers have the places ``firsts``."""
    pairs = zip(places, firsts, strict=True)
    return tuple(slice(part.start - first, part.stop - first) for part, first in pairs)
