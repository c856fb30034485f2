"""The linears whose 2:4 products are measured: of an exported folder, or of a shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError, ConfigError
from megamask.runtime.sparse_kernels import DTYPES, KERNELS, NONE_24, Shape, is_two_of_four
from megamask.storage import real_path
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import linear_shapes
from megamask.weights.shapes import read_shape

PRUNED = "Write it with megamask export and a 2:4 mask, or name such a folder with speed.folder."


@dataclass(frozen=True)
class Subject:
    """A model whose linears are measured.

    Attributes:
        name: of the shape or folder.
        shapes: (O, I) of 2:4 linears -> their number.
        dense: number of the other linears.
        arch: the architecture.
        folder: a folder that can generate; None for a shape.
    """

    name: str
    shapes: dict[Shape, int]
    dense: int
    arch: Architecture
    folder: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What the times depend on: the shapes, and the files of a folder."""
        files = []
        if self.folder is not None:
            ends = (".safetensors", ".bin", "config.json")
            found = sorted(one for one in self.folder.iterdir() if one.name.endswith(ends))
            files = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in found]
        linears = [[*shape, count] for shape, count in self.shapes.items()]
        return {"model": self.name, "linears": linears, "dense": self.dense, "files": files}


def subject_of_shape(name: str, dtype: str, ignore_keys: Collection[str] = ()) -> Subject:
    """The linears of a known shape, of a folder's config.json or of such a file, taken as 2:4.

    Raises:
        ConfigError: there is no such shape, or no kernel takes one of its linears.
        ArtifactError: config.json cannot be read.
    """
    arch = read_shape(name, ignore_keys=ignore_keys)
    shapes = Counter(linear_shapes(arch).values())
    if problem := _not_taken(shapes, dtype):
        raise ConfigError("--model", name, problem, "Name another shape.")
    return Subject(real_path(Path(name)).name if Path(name).exists() else name, shapes, 0, arch)


def subject_of_folder(folder: Path, dtype: str, ignore_keys: Collection[str] = ()) -> Subject:
    """The 2:4 linears of a Hugging Face folder, whose weights are read one by one.

    Raises:
        ArtifactError: the folder is none, has no 2:4 linear, or none that a kernel takes.
    """
    arch = read_architecture(folder, ignore_keys)
    with open_checked(folder, ignore_keys) as source:
        found = {
            name: shape
            for name, shape in linear_shapes(arch).items()
            if is_two_of_four(source.tensor(f"{name}.weight"))
        }
    if not found:
        raise ArtifactError(folder, NONE_24, PRUNED)
    shapes = Counter(found.values())
    if problem := _not_taken(shapes, dtype):
        raise ArtifactError(folder, problem, "Its dense linears are as fast as they can be.")
    dense = len(linear_shapes(arch)) - len(found)
    return Subject(real_path(folder).name, shapes, dense, arch, folder)


def _not_taken(shapes: Collection[Shape], dtype: str) -> str:
    """Why no kernel takes any of the linears; empty if one takes one."""
    whys = [
        f"{shape[0]} x {shape[1]}: {kernel.why_not(shape, DTYPES[dtype])}"
        for shape in shapes
        for kernel in KERNELS.values()
        if kernel.why_not(shape, DTYPES[dtype])
    ]
    if len(whys) < len(shapes) * len(KERNELS):
        return ""
    return f"has no linear that a 2:4 kernel takes; {'; '.join(dict.fromkeys(whys))}"
