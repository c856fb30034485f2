"""Files of tensors that are written while the next numbers are made.

A tensor is handed over in blocks, so neither a file nor a tensor is ever in memory as a whole. The
blocks are copied, in the dtype of the file, into a few buffers that are used again and again: new
memory costs as much time as the disk. A thread writes full buffers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from megamask.weights.source import Blocks

BLOCK = 2**20  # bytes of a buffer; what was copied there is still in the cache when it is looked at
BUFFERS = 4
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Streamed:
    """A tensor that is made while it is written.

    Attributes:
        shape: of the tensor.
        dtype: of the numbers in the file; blocks of another dtype are converted.
        blocks: makes the blocks, whose numbers one after another are those of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor | Streamed) -> Streamed:
        """A tensor in memory, or one that is streamed already."""
        if isinstance(tensor, Streamed):
            return tensor
        return cls(tuple(tensor.shape), tensor.dtype, lambda: (tensor.detach(),))

    @classmethod
    def from_source(cls, source: Blocks, name: str) -> Streamed:
        """A tensor of a model, read block by block."""
        shape, dtype = source.shape(name), source.read(name, slice(0, 0)).dtype
        parts = [*row_blocks(shape, dtype)] if shape else [slice(0, 1)]
        return cls(shape, dtype, lambda: (source.read(name, rows) for rows in parts))

    def t(self) -> Streamed:
        """The transposed matrix, which is in memory as a whole while it is written."""
        return Streamed(self.shape[::-1], self.dtype, lambda: (torch.cat(list(self.blocks())).t(),))


def row_blocks(shape: tuple[int, ...], dtype: torch.dtype, first: int = 0) -> Iterator[slice]:
    """Slices of the rows of a tensor whose blocks take a buffer at most, or a row.

    Args:
        shape: of the tensor.
        dtype: of its numbers.
        first: number of the first row.
    """
    row = torch.Size(shape[1:]).numel() * dtype.itemsize
    step = max(1, BLOCK // max(row, 1))
    for start in range(first, first + shape[0], step):
        yield slice(start, min(start + step, first + shape[0]))


class FileStream:
    """A new file. The object is a context manager; its end waits until all is written.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be written. A failure of the thread is raised by the next call.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[Tensor, int] | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(torch.empty(BLOCK, dtype=torch.uint8))  # no memory before its first use
        self._buffer, self._used, self._before = self._free.get(), 0, 0
        self._error: BaseException | None = None
        # A signal may end the caller before it can tell the thread to end.
        name = f"writer of {path.name}"
        self._thread = threading.Thread(target=self._write_all, name=name, daemon=True)
        self._thread.start()

    def tell(self) -> int:
        """Bytes that the file has so far."""
        return self._before + self._used

    def write(self, data: bytes) -> None:
        """Append bytes."""
        if data:
            self.put(torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.uint8)

    def put(
        self, numbers: Tensor, dtype: torch.dtype, seen: Callable[[Tensor], None] | None = None
    ) -> None:
        """Append the numbers of a tensor in their order.

        Args:
            numbers: any tensor, on any device.
            dtype: in which the file has them.
            seen: called with the numbers as the file has them, (count,), a part at a time; the part
                is valid during the call.
        """
        for part in _cut(numbers, BLOCK // dtype.itemsize):
            size = part.numel() * dtype.itemsize
            if self._used % dtype.itemsize or self._used + size > BLOCK:
                self._hand_over()
            stored = self._buffer[self._used : self._used + size].view(dtype)
            _copy(part.detach(), stored.view(part.shape))
            self._used += size
            if seen is not None:
                seen(stored)

    def __enter__(self) -> FileStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._error is None:
                self._hand_over()
        finally:
            self._full.put(None)
            self._thread.join()
            self._file.close()
        if kind is None and self._error is not None:
            raise self._error

    def _hand_over(self) -> None:
        """Give the buffer to the thread, and take a free buffer."""
        if self._error is not None:
            raise self._error
        self._full.put((self._buffer, self._used))
        self._before, self._used = self._before + self._used, 0
        self._buffer = self._free.get()

    def _write_all(self) -> None:
        """Write what is handed over, until there is nothing more. After an error nothing is
        written.
        """
        while (full := self._full.get()) is not None:
            buffer, used = full
            try:
                left = buffer.numpy().data[:used]
                while left and self._error is None:
                    left = left[self._file.write(left) :]
            except BaseException as error:
                self._error = error
            self._free.put(buffer)


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy numbers. PyTorch shares a copy among threads, which wait for one another where the cores
    have other work, such as the thread that writes; so equal dtypes are copied by numpy.
    """
    if source.dtype == target.dtype and source.device.type == "cpu":
        bits = _BITS[source.dtype.itemsize]
        np.copyto(target.view(bits).numpy(), source.view(bits).numpy())
    else:
        target.copy_(source)


def _cut(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """Parts of at most so many numbers, which are the tensor one after another."""
    if tensor.numel() <= most:
        if tensor.numel():
            yield tensor
        return
    row = tensor[0].numel()
    if row > most:
        for one in tensor:
            yield from _cut(one, most)
        return
    step = most // row
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step]
