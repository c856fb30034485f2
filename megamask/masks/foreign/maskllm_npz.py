"""MaskLLM's ``mask_compressed.npz``: for each weight an array ``NAME.weight.mask`` of uint8, the
flattened mask packed by ``numpy.packbits``, the first bit in the highest place, 1 = keep.

The archive says no shapes; they come from the base model. Source: ``eval_llama_ppl.py`` of
NVlabs/MaskLLM. Each array is read with the length that its linear needs and no more, and nothing is
ever unpickled.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.file_kinds import require_file, wrong_file
from megamask.masks.foreign.kind import FIX, Base, Kind
from megamask.masks.shapes_fit import check_shapes

WHAT = "MaskLLM's mask_compressed.npz"
ENDING = ".weight.mask.npy"
# What zipfile and numpy's parser of headers say of damaged bytes.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
    *(EOFError, OSError, ValueError, TypeError, SyntaxError, LookupError),
    *(NotImplementedError, RuntimeError, OverflowError, MemoryError),
)


def read(path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of an archive. The arguments and errors are those of ``Kind.read``."""
    require_file(path, WHAT, FIX)
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED as error:
        raise wrong_file(path, WHAT, FIX, error) from error
    with archive:
        members = archive.namelist()
        other = [name for name in members if not name.endswith(ENDING)]
        if other or not members or len(set(members)) != len(members):
            problem = f"holds {other[0]!r}" if other else "holds no array, or an array twice"
            raise ArtifactError(path, f"{problem}, and not only arrays NAME{ENDING[:-4]}", FIX)
        names = [name.removesuffix(ENDING) for name in members]
        known = {name: base.shapes.get(name, (0, 0)) for name in names}
        check_shapes(path, known, base.shapes)
        for name, member in zip(names, members, strict=True):
            try:
                packed = _packed(archive, member, math.prod(base.shapes[name]))
            except _DAMAGED as error:
                problem = f"holds a mask of {name} that does not fit or is damaged ({error})"
                raise ArtifactError(path, problem, FIX) from error
            bits = np.unpackbits(packed, count=math.prod(base.shapes[name]))
            mask = torch.from_numpy(bits.view(np.bool_))
            rows, columns = base.shapes[name]
            if f"{name}.weight" in base.transposed:
                yield name, mask.view(columns, rows).t()
            else:
                yield name, mask.view(rows, columns)


def _packed(
    archive: zipfile.ZipFile, member: str, weights: int
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of an array that holds a bit for each of so many weights.

    Raises:
        ValueError: the array has another type or length; and see ``_DAMAGED``.
    """
    wanted = (weights + 7) // 8
    if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("numpy writes no such compression")  # others cannot be read in parts
    with archive.open(member) as stream:
        if npy.read_magic(stream) != (1, 0):  # longer headers only serve arrays of records
            raise ValueError("its header is not of version 1.0")
        shape, _, dtype = npy.read_array_header_1_0(stream)
        if dtype != np.uint8 or math.prod(shape) != wanted:
            raise ValueError(f"{dtype} {shape}, not uint8 ({wanted},) for {weights:,} weights")
        content = stream.read(wanted + 1)
    if len(content) != wanted:
        raise ValueError(f"{len(content):,} bytes, not {wanted:,}")
    return np.frombuffer(content, np.uint8)


KIND = Kind("maskllm", WHAT, lambda path: path.suffix == ".npz", read)
