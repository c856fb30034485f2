"""Hugging Face (HF) folders: read any block of any tensor, and write tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.file_kinds import SAFETENSORS, require_file, wrong_file
from megamask.storage import atomic_dir, read_object, write_json
from megamask.weights import torch_bin
from megamask.weights.architecture import read_architecture
from megamask.weights.file_layout import FileLayout, file_layout, turned
from megamask.weights.file_stream import Streamed
from megamask.weights.mapping import expected_tensors
from megamask.weights.safetensors_writer import write_safetensors
from megamask.weights.side_files import copy_side_files
from megamask.weights.source import BITS, some_of

log = logging.getLogger(__name__)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".npz", ".ckpt")
PLAIN = FileLayout()
FIX = (
    "Download the model again, or point model.hf at a complete Hugging Face folder "
    "with .safetensors files or pytorch_model.bin."
)


class HFReader:
    """The tensors of an HF folder, read block by block, weights of linears as (O, I). The reader is
    a context manager.

    Args:
        hf_dir: the folder.
        layout: how its files hold the tensors.

    Raises:
        ArtifactError: there are no weights, a file is missing or torn, the index disagrees with the
            files, or the folder holds a single file beside those of the index.
    """

    def __init__(self, hf_dir: Path, layout: FileLayout = PLAIN) -> None:
        self.folder = hf_dir
        self._handles: dict[Path, Any] = {}
        stored = self._index()
        self.layout = layout.of_files(stored)
        self._name_in_file = {self.layout.ours(name): name for name in stored}
        self._file_of = {ours: stored[name] for ours, name in self._name_in_file.items()}

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        stored = tuple(self._slice(name).get_shape())
        return stored[::-1] if name in self.layout.transposed else stored

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the numbers of a tensor."""
        return self.read(name, slice(0, 0)).dtype

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """A block of a tensor, ``cols`` along the second axis: a ``Read`` for the mapping table. A
        number alone has no rows and is returned as it is.
        """
        stored = self._slice(name)
        if not stored.get_shape():
            return self.tensor(name)
        if name in self.layout.transposed:
            turned: Tensor = stored[slice(None) if cols is None else cols, rows]
            return turned.t()
        part: Tensor = stored[rows] if cols is None else stored[rows, cols]
        return part

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        whole: Tensor = self._handle(name).get_tensor(self._name_in_file[name])
        return whole.t() if name in self.layout.transposed else whole

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Check that the folder holds exactly the tensors ``expected`` (name -> shape).

        Two kinds of extra tensors are allowed: buffers of old checkpoints, which follow from the
        config, and a head that is a copy of the tied embedding. The tensors beside a text part are
        not expected by name, but each of their parts must be there.

        Raises:
            ArtifactError: tensors are missing, unknown, wrongly shaped or no plain floating-point
                numbers; the message names them.
        """
        extra = [
            name
            for name in self._file_of
            if name not in expected
            and not name.endswith(self.layout.buffers)
            and not self.layout.is_other(name)
        ]
        parts = [f"{part}*" for part in self.layout.others if not self._has(part)]
        problems = {
            "misses": [name for name in expected if name not in self._file_of] + parts,
            "has unknown": [name for name in extra if not self._is_copy_of_embedding(name)],
            "has wrongly shaped": [
                f"{name} {self.shape(name)}, expected {shape}"
                for name, shape in expected.items()
                if name in self._file_of and self.shape(name) != shape
            ],
            "has quantized": [
                f"{name} ({str(dtype).removeprefix('torch.')})"
                for name in expected
                if name in self._file_of and (dtype := self.dtype(name)) not in BITS
            ],
        }
        faults = [f"{what} tensors: {some_of(names)}" for what, names in problems.items() if names]
        if faults:
            fix = "The files must match config.json. " + FIX
            raise ArtifactError(self.folder, "; ".join(faults), fix)

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.clear()

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file, from the files themselves; an index must agree with them."""
        single, index = self._names_of_files()
        if not index.exists():
            self._check_format(single)
            return dict.fromkeys(self._open(single).keys(), single)
        weight_map = read_object(index, FIX, {"weight_map": dict})["weight_map"]
        for name, file in weight_map.items():
            if not isinstance(file, str) or file != Path(file).name:
                raise ArtifactError(index, f"names {file!r} as the file of {name}", FIX)
        if single.exists() and {*weight_map.values()} != {single.name}:
            # transformers reads the single file alone
            problem = f"holds two models: {single.name}, and the parts that {index.name} names"
            fix = f"Remove what is not the model: {single.name}, or the index with its parts."
            raise ArtifactError(self.folder, problem, fix)
        listed = {name: self.folder / file for name, file in weight_map.items()}
        held: dict[str, Path] = {}
        for path in sorted(set(listed.values())):
            held.update(dict.fromkeys(self._open(path).keys(), path))
        if held != listed:
            wrong = [
                name for name in listed.keys() | held.keys() if listed.get(name) != held.get(name)
            ]
            raise ArtifactError(index, f"does not match the shards: {some_of(sorted(wrong))}", FIX)
        return held

    def _names_of_files(self) -> tuple[Path, Path]:
        """The single file and the index: those of safetensors, unless there are only PyTorch's."""
        names = [(SINGLE, INDEX), (torch_bin.SINGLE, torch_bin.INDEX)]
        places = [(self.folder / single, self.folder / index) for single, index in names]
        return next((pair for pair in places if any(file.exists() for file in pair)), places[0])

    def _check_format(self, single: Path) -> None:
        """Check, in a folder without an index, that the weights are in the one file that is read.

        Raises:
            ArtifactError: the folder has weights in other files alone.
        """
        if single.exists() or not self.folder.is_dir():
            return
        parts = sorted(self.folder.glob("*.safetensors"))
        if parts:
            problem = f"holds {parts[0].name} and neither {SINGLE} nor {INDEX}"
            raise ArtifactError(self.folder, problem, f"Copy {INDEX} too, or: {FIX}")
        others = [path for end in OTHER_WEIGHTS for path in sorted(self.folder.glob(f"*{end}"))]
        if others:
            raise wrong_file(others[0], SAFETENSORS, FIX)

    def _open(self, path: Path) -> Any:
        if path not in self._handles and path.suffix == ".bin":
            self._handles[path] = torch_bin.TorchFile(path, FIX)
        elif path not in self._handles:
            require_file(path, SAFETENSORS, FIX)
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise wrong_file(path, SAFETENSORS, FIX, error) from error
        return self._handles[path]

    def _handle(self, name: str) -> Any:
        """The open file that holds a tensor."""
        if name not in self._file_of:
            raise ArtifactError(self.folder, f"misses tensors: {name}", FIX)
        return self._open(self._file_of[name])

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(self._name_in_file[name])

    def _has(self, part: str) -> bool:
        return any(name.startswith(part) for name in self._file_of)

    def _is_copy_of_embedding(self, name: str) -> bool:
        embedding = self.layout.embedding
        return (
            self.layout.head in (name, self._name_in_file[name])
            and embedding in self._file_of
            and torch.equal(self.tensor(name), self.tensor(embedding))
        )


def open_checked(hf_dir: Path, ignore_keys: Collection[str] = ()) -> HFReader:
    """Open a folder and check its tensors against its config.json.

    Args:
        hf_dir: the folder.
        ignore_keys: see ``read_architecture``.

    Raises:
        ArtifactError, ConfigError: see ``HFReader.check`` and ``read_architecture``.
    """
    arch = read_architecture(hf_dir, ignore_keys)
    reader = HFReader(hf_dir, file_layout(arch))
    reader.check(expected_tensors(arch))
    return reader


def write_hf(
    out_dir: Path,
    tensors: Iterable[tuple[str, Tensor | Streamed]],
    source_dir: Path,
    max_shard_bytes: int = 5 * 10**9,
    finish: Callable[[Path], None] | None = None,
    layout: FileLayout = PLAIN,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write an HF folder tensor by tensor.

    Every file of ``source_dir`` but weights is copied: config, tokenizer, templates, licence, code.

    Args:
        out_dir: the folder; replaced when everything is written, and unchanged after an error.
        tensors: pairs of name and tensor on any device. A streamed tensor is never in memory as a
            whole.
        source_dir: the folder of the side files.
        max_shard_bytes: size limit of a weight file, in bytes.
        finish: called with the written folder before it is renamed to ``out_dir``, to check it or
            to add files.
        layout: how the files hold the tensors.
        config: see ``copy_side_files``.
    """
    with atomic_dir(out_dir) as folder:
        write_tensors(folder, turned(tensors, layout), max_shard_bytes)
        copy_side_files(source_dir, folder, config)
        if finish is not None:
            finish(folder)


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor | Streamed]],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the weight files of a folder; the arguments are those of ``write_hf``."""
    shards: list[dict[str, Streamed]] = []
    size = max_shard_bytes
    for name, tensor in tensors:
        numbers = Streamed.of(tensor)
        if not shards or (size and size + numbers.nbytes > max_shard_bytes):
            shards.append({})
            size = 0
        shards[-1][name] = numbers
        size += numbers.nbytes
    for number, shard in enumerate(shards):
        write_safetensors(folder / f"{number}.part", shard)
    _name_shards(folder, [{name: one.nbytes for name, one in shard.items()} for shard in shards])


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the files their final names, which contain the number of files, and write the index."""
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, sizes in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / final)
        weight_map.update(dict.fromkeys(sizes, final))
    total = sum(sum(sizes.values()) for sizes in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
