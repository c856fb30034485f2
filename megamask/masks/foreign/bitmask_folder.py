"""A folder of llm-compressor's old format ``sparse-24-bitmask`` (compressed-tensors), which is read
and never written.

In the place of ``NAME.weight`` (O, I) stand ``NAME.shape``, ``NAME.compressed`` (O, I / 2), the
kept weights of each row in order, and ``NAME.bitmask`` (O, ceil(I / 8)) of uint8, the first bit in
the lowest place, 1 = keep. Other tensors lie as in any folder. Source:
``sparse_24_bitmask.py`` of vllm-project/compressed-tensors. The names may also begin with
``NAME.weight``, as in its older format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.masks.foreign.kind import FIX, Base, Kind
from megamask.masks.foreign.pruned_folder import masks_of
from megamask.storage import read_object
from megamask.weights.file_layout import FileLayout
from megamask.weights.hf_files import HFReader
from megamask.weights.mapping import expected_tensors

WHAT = "a compressed-tensors folder (sparse-24-bitmask)"
READ = ("sparse-24-bitmask", "dense")
PARTS = ("shape", "compressed", "bitmask")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def fits(path: Path) -> bool:
    """Whether a folder's config.json names compressed-tensors' sparsity."""
    return path.is_dir() and _sparsity(_config(path)) is not None


def read(path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of a folder. The arguments and errors are those of ``Kind.read``."""
    config = _config(path)
    kept_as = (_sparsity(config) or {}).get("format")
    if kept_as not in READ:
        problem = f"keeps its sparse weights in the format {kept_as!r}"
        raise ArtifactError(path, problem, f"import reads {' and '.join(READ)}.")
    if _quantization(config).get("config_groups"):
        problem = "is quantized: its weights are not those of the base model"
        raise ArtifactError(path, problem, "Import the pruned model from before it was quantized.")
    reader = BitmaskReader(path, base.layout)
    with reader:
        reader.check(expected_tensors(base.arch))
        yield from masks_of(reader, base, reader.mask)


class BitmaskReader(HFReader):
    """The tensors of a folder; ``NAME.weight`` in the place of its three parts."""

    def __init__(self, folder: Path, layout: FileLayout) -> None:
        super().__init__(folder, layout)
        self._begins: dict[str, str] = {}  # NAME.weight -> the beginning of the names of its parts
        for part in [name for name in self._file_of if name.endswith(f".{PARTS[-1]}")]:
            begin = part.removesuffix(f".{PARTS[-1]}")
            self._begins[f"{begin.removesuffix('.weight')}.weight"] = begin
        for begin in self._begins.values():
            lacking = [part for part in PARTS if f"{begin}.{part}" not in self._file_of]
            if lacking:
                raise ArtifactError(folder, f"misses tensors: {begin}.{lacking[0]}", FIX)
        self._parts = dict(self._file_of)
        for weight, begin in self._begins.items():
            files = [self._file_of.pop(f"{begin}.{part}") for part in PARTS]
            self._file_of[weight] = files[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; that of the parts is compared with the shape that they say."""
        if name not in self._begins:
            return super().shape(name)
        told = self._part(name, "shape")
        sizes = (
            told.flatten().tolist() if told.numel() == 2 and not told.is_floating_point() else []
        )
        rows, columns = sizes or (0, 0)
        wanted = {"compressed": (rows, columns // 2), "bitmask": (rows, (columns + 7) // 8)}
        for part, shape in wanted.items():
            found = self._part(name, part)
            is_right = found.dtype == torch.uint8 if part == "bitmask" else found.dtype in FLOATS
            if tuple(found.shape) != shape or not is_right:
                dtype = str(found.dtype).removeprefix("torch.")
                problem = f"holds {dtype} {tuple(found.shape)} as {self._begins[name]}.{part}"
                raise ArtifactError(self.folder, f"{problem}, not {shape}", FIX)
        return rows, columns

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the kept weights."""
        is_whole = name not in self._begins
        return super().dtype(name) if is_whole else self._part(name, "compressed").dtype

    def mask(self, name: str) -> Tensor | None:
        """The mask (O, I) of a linear; None where its weight lies as in any folder.

        Raises:
            ArtifactError: its rows do not keep half of their weights.
        """
        weight = f"{name}.weight"
        if weight not in self._begins:
            return None
        bits, columns = self._part(weight, "bitmask"), self.shape(weight)[1]
        unpacked = np.unpackbits(bits.numpy(), axis=-1, count=columns, bitorder="little")
        mask_OI = torch.from_numpy(unpacked.view(np.bool_))
        if bool((mask_OI.sum(-1) != columns // 2).any()):
            problem = f"does not keep half of the weights of each row of {name}"
            raise ArtifactError(self.folder, problem, FIX)
        return mask_OI

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, zeros in pruned places."""
        mask_OI = self.mask(name.removesuffix(".weight"))
        if mask_OI is None:
            return super().tensor(name)
        values = self._part(name, "compressed")
        whole_OI = torch.zeros(mask_OI.shape, dtype=values.dtype)
        whole_OI[mask_OI] = values.flatten()
        return whole_OI

    def _part(self, weight: str, part: str) -> Tensor:
        name = f"{self._begins[weight]}.{part}"
        found: Tensor = self._open(self._parts[name]).get_tensor(self._name_in_file[name])
        return found


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / "config.json", "", {})
    except ArtifactError:  # told by whoever reads the folder as a model
        return {}


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes how the weights lie; its key has changed."""
    for key in ("quantization_config", "compression_config"):
        if isinstance(config.get(key), dict):
            found: dict[str, Any] = config[key]
            return found
    return {}


def _sparsity(config: dict[str, Any]) -> dict[str, Any] | None:
    found = _quantization(config).get("sparsity_config") or config.get("sparsity_config")
    return found if isinstance(found, dict) and found else None


KIND = Kind("compressed-tensors", WHAT, fits, read)
