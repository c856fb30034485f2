"""A NumPy archive of masks that ``numpy.packbits`` packed: uint8, the first bit in the highest
place, 1 = keep.

Each array is read with the length that its linear needs and no more, and nothing is ever unpickled.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.file_kinds import require_file, wrong_file
from megamask.masks.foreign.kind import FIX, Base

NPY = ".npy"
# What zipfile and numpy's parser of headers say of damaged bytes.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
    *(EOFError, OSError, ValueError, TypeError, SyntaxError, LookupError),
    *(NotImplementedError, RuntimeError, OverflowError, MemoryError),
)


class Archive:
    """An open archive.

    Attributes:
        path: the file.
        names: of its arrays, in order.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        members = archive.namelist()
        self.names = [member.removesuffix(NPY) for member in members]
        other = [member for member in members if not member.endswith(NPY)]
        if other or not members or len(set(members)) != len(members):
            problem = f"holds {other[0]!r}" if other else "holds no array, or an array twice"
            raise ArtifactError(path, f"{problem}, and not only arrays", FIX)

    def mask(self, array: str, name: str, base: Base) -> Tensor:
        """The mask (O, I) of a linear, from the packed bits of an array.

        Raises:
            ArtifactError: the array has another length or type, or is damaged.
        """
        shape = base.shape_in_files(name)
        weights = math.prod(shape)
        packed = self.numbers(array, f"a mask of {name}", "u1", ((weights + 7) // 8,))
        bits = np.unpackbits(packed, count=weights)
        return base.turned(name, torch.from_numpy(bits.view(np.bool_)).view(shape))

    def numbers(self, array: str, what: str, types: str, shape: Sequence[int]) -> npt.NDArray[Any]:
        """An array.

        Args:
            array: its name.
            what: a noun for messages.
            types: NumPy's codes of the dtypes that it may have, separated by spaces.
            shape: its shape.

        Raises:
            ArtifactError: the array has another shape or dtype, or is damaged.
        """
        try:
            return self._numbers(f"{array}{NPY}", types.split(), tuple(shape))
        except _DAMAGED as error:
            problem = f"holds {what} that does not fit or is damaged ({error})"
            raise ArtifactError(self.path, problem, FIX) from error

    def _numbers(self, member: str, types: list[str], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if self._archive.getinfo(member).compress_type not in _COMPRESSIONS:
            raise ValueError("numpy writes no such compression")  # others cannot be read in parts
        with self._archive.open(member) as stream:
            if npy.read_magic(stream) != (1, 0):  # longer headers only serve arrays of records
                raise ValueError("its header is not of version 1.0")
            found, _, dtype = npy.read_array_header_1_0(stream)
            if dtype not in [np.dtype(one) for one in types] or found != shape:
                raise ValueError(f"{dtype} {found}, not {np.dtype(types[0])} {shape}")
            wanted = dtype.itemsize * math.prod(shape)
            content = stream.read(wanted + 1)
        if len(content) != wanted:
            raise ValueError(f"{len(content):,} bytes, not {wanted:,}")
        return np.frombuffer(content, dtype).reshape(shape)


_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@contextmanager
def opened(path: Path, what: str) -> Iterator[Archive]:
    """Open an archive.

    Args:
        path: the file.
        what: a noun for messages.

    Raises:
        ArtifactError: the file is missing, damaged, or holds something else than arrays.
    """
    require_file(path, what, FIX)
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise wrong_file(path, what, FIX, error) from error
    with archive:
        yield Archive(path, archive)


def names_of_arrays(path: Path) -> list[str]:
    """The names of the arrays of an archive; none where there is no whole archive."""
    try:
        if not path.is_file():
            return []
        with zipfile.ZipFile(path) as archive:
            return [member.removesuffix(NPY) for member in archive.namelist()]
    except _DAMAGED:
        return []
