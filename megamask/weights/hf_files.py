"""Hugging Face folders, streamed: read any block of any tensor, write tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.storage import atomic_dir, read_json, write_json
from megamask.weights.architecture import read_architecture
from megamask.weights.mapping import expected_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
FIX = "Download the model again, or point model.hf at a complete Hugging Face folder with .safetensors files."


class HFReader:
    """Tensors of an HF folder. Nothing is read until it is asked for; usable as a context manager.

    Raises:
        ArtifactError: no safetensors, a missing or torn shard, an index that disagrees with the
            shards.
    """

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = hf_dir
        self._handles: dict[Path, Any] = {}
        self._file_of = self._index()

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """That block of a tensor (``cols`` along the second axis); a ``Read`` for the mapping
        table.
        """
        part = self._slice(name)
        return part[rows] if cols is None else part[rows, cols]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        self._slice(name)
        return self._handles[self._file_of[name]].get_tensor(name)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Check that the folder holds exactly the tensors ``expected`` (name -> shape).

        Old checkpoints also carry rotary frequencies, which are derived, and tied ones a copy of
        the embedding as the head.

        Raises:
            ArtifactError: missing, unknown or wrongly shaped tensors, by name.
        """
        extra = [
            name
            for name in self._file_of
            if name not in expected and not name.endswith("rotary_emb.inv_freq")
        ]
        problems = {
            "misses": [name for name in expected if name not in self._file_of],
            "has unknown": [name for name in extra if not self._is_copy_of_embedding(name)],
            "has wrongly shaped": [
                f"{name} {self.shape(name)}, expected {shape}"
                for name, shape in expected.items()
                if name in self._file_of and self.shape(name) != shape
            ],
        }
        found = [f"{what} tensors: {_some(names)}" for what, names in problems.items() if names]
        if found:
            raise ArtifactError(
                self.hf_dir, "; ".join(found), "The files must match config.json. " + FIX
            )

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
        index = self.hf_dir / INDEX
        if not index.exists():
            return dict.fromkeys(self._open(self.hf_dir / SINGLE).keys(), self.hf_dir / SINGLE)
        listed = {
            name: self.hf_dir / file
            for name, file in read_json(index, FIX).get("weight_map", {}).items()
        }
        held = {
            name: path
            for path in sorted(set(listed.values()))
            for name in self._open(path).keys()  # noqa: SIM118 - not a dict
        }
        if held != listed:
            wrong = [
                name for name in listed.keys() | held.keys() if listed.get(name) != held.get(name)
            ]
            raise ArtifactError(index, f"does not match the shards: {_some(sorted(wrong))}", FIX)
        return held

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise ArtifactError(path, "is missing", FIX) from None
            except (SafetensorError, OSError) as error:
                raise ArtifactError(
                    path, f"is torn or not a safetensors file ({error})", FIX
                ) from error
        return self._handles[path]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ArtifactError(self.hf_dir, f"misses tensors: {name}", FIX)
        return self._open(self._file_of[name]).get_slice(name)

    def _is_copy_of_embedding(self, name: str) -> bool:
        embedding = "model.embed_tokens.weight"
        return (
            name == "lm_head.weight"
            and embedding in self._file_of
            and torch.equal(self.tensor(name), self.tensor(embedding))
        )


def open_checked(hf_dir: Path) -> HFReader:
    """A reader of a folder whose tensors were checked against its config.json.

    Raises:
        ArtifactError, ConfigError: see ``HFReader.check`` and ``read_architecture``.
    """
    expected = expected_tensors(read_architecture(hf_dir))
    reader = HFReader(hf_dir)
    reader.check(expected)
    return reader


def write_hf(
    out_dir: Path,
    tensors: Iterable[tuple[str, Tensor]],
    source_dir: Path,
    max_shard_bytes: int = 5 * 10**9,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write an HF folder tensor by tensor; config, generation config, tokenizer and licence come
    from ``source_dir``.

    Args:
        out_dir: replaced as a whole when everything is written, or left as it was.
        tensors: name and tensor, any device; one shard of them is held in memory.
        source_dir: folder that the side files are copied from.
        max_shard_bytes: a new file is begun before this size.
        finish: run on the whole folder before it takes its name, to check it or add to it; an error
            leaves ``out_dir`` as it was.
    """
    with atomic_dir(out_dir) as folder:
        shards = _write_shards(folder, tensors, max_shard_bytes)
        _name_shards(folder, shards)
        for pattern in SIDE_FILES:
            for file in source_dir.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        share(folder)
        if finish is not None:
            finish(folder)


def require_own(out_dir: Path, stamp: str, key: str) -> None:
    """Check that ``out_dir`` may be replaced: it is not there, empty, or holds the file ``stamp``
    that an earlier run wrote.

    Raises:
        ArtifactError: naming ``key``, the setting that chose the folder.
    """
    if out_dir.exists() and not (
        out_dir.is_dir() and ((out_dir / stamp).exists() or not any(out_dir.iterdir()))
    ):
        raise ArtifactError(
            out_dir,
            "holds files that this verb did not make, and would replace",
            f"Remove it, or point {key} elsewhere.",
        )


def share(folder: Path) -> None:
    """Give weight files the mode of an ordinary new file (safetensors lets only the owner read
    them).
    """
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int
) -> list[dict[str, int]]:
    """Write numbered files; per file the bytes of each tensor."""
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
            shards.append({name: tensor.nbytes for name, tensor in held.items()})
            held.clear()

    for name, tensor in tensors:
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > limit:
            flush()
        # A copy of its own: views of one fused tensor share storage, which safetensors refuses.
        held[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    flush()
    return shards


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the files their final names, which hold the number of files, and write the index."""
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
