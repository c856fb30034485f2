"""The margins of a mask file, in a file of their own beside it: METHOD.margins.

The file is a safetensors container like a mask file: one packed tensor per HF linear, 4 bits a
weight, and a JSON header. The header names the masks that the margins belong to by their digest.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamask import __version__
from megamask.config.paths import margins_path
from megamask.errors import ArtifactError
from megamask.file_kinds import wrong_file
from megamask.masks import codec
from megamask.masks.container import write_words
from megamask.masks.header import check_tensors, header_digest, misfit
from megamask.sparsity.margins import LEVELS, margins_of
from megamask.storage import lacks

FORMAT_VERSION = 1
KIND = "margins"
FIX = "Run the verb prune again, or start without margins: learn.prior.margins=false."
NONE = (
    "Run the verb prune, which writes margins beside its masks; name a snapshot; or start without "
    "margins: learn.prior.margins=false."
)
FACTS: dict[str, Any] = {"format_version": int, "kind": str, "masks": str, "tensors": dict}


class Margins(Mapping[str, Tensor]):
    """Margins of masks: HF module name -> fp32 (O, I), in medians of the linear."""

    @abstractmethod
    def levels(self, name: str) -> Tensor:
        """The margins of a linear as levels of 4 bits, (O, I) uint8."""

    def __getitem__(self, name: str) -> Tensor:
        return margins_of(self.levels(name))

    @property
    @abstractmethod
    def content_sha256(self) -> str:
        """Digest of the margins and of the masks that they belong to."""


class FileMargins(Margins):
    """The margins of a file. They are decoded when they are read from the mapping.

    Attributes:
        path: the file.
        meta: the whole header.
    """

    def __init__(self, path: Path, handle: Any, meta: Mapping[str, Any]) -> None:
        self.path, self.meta, self._handle = path, meta, handle

    def levels(self, name: str) -> Tensor:
        """The levels of a linear, decoded now.

        Raises:
            ArtifactError: they are corrupt.
        """
        rows, columns = self.meta["tensors"][name]["shape"]
        try:
            levels = codec.unpack(self._words(name), rows * columns, LEVELS)
        except ValueError as error:
            problem = f"margins of {name} are corrupt: {error}"
            raise ArtifactError(self.path, problem, FIX) from None
        return torch.from_numpy(levels).view(rows, columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta["tensors"])

    def __len__(self) -> int:
        return len(self.meta["tensors"])

    def _words(self, name: str) -> codec.Words:
        words: codec.Words = self._handle.get_tensor(name)
        digest = hashlib.sha256(words.tobytes()).hexdigest()
        if digest != self.meta["tensors"][name]["sha256"]:
            problem = f"margins of {name} are corrupt: the checksum does not match"
            raise ArtifactError(self.path, problem, FIX)
        return words

    def check_whole(self) -> None:
        """Compare every checksum without decoding the margins.

        Raises:
            ArtifactError: the first margins that are corrupt.
        """
        for name in self:
            self._words(name)

    @property
    def content_sha256(self) -> str:
        """Digest of masks, names, shapes and margins, from the checksums of the header."""
        facts = [[name, self.meta["tensors"][name]] for name in sorted(self)]
        text = json.dumps([self.meta["masks"], facts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def save_margins(
    path: Path,
    masks: str,
    shapes: Mapping[str, tuple[int, ...]],
    levels: Iterable[tuple[str, Tensor]],
) -> None:
    """Write the file atomically, with the levels of one linear in memory at a time.

    Args:
        path: the file.
        masks: ``content_sha256`` of the masks that the margins belong to.
        shapes: HF module name -> (O, I) of every linear, in the order of the header.
        levels: HF module name and levels, (O, I) uint8 on the CPU, of every linear, in any order.
    """
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "megamask": __version__,
        "masks": masks,
        "tensors": {},
    }

    def metadata(digests: Mapping[str, str]) -> str:
        header["tensors"] = {
            name: {"shape": list(shape), "sha256": digests[name]} for name, shape in shapes.items()
        }
        return json.dumps({**header, "sha256": header_digest(header)})

    counts = {name: codec.num_words(rows * cols, LEVELS) for name, (rows, cols) in shapes.items()}
    words = ((name, codec.pack(one, LEVELS)) for name, one in levels)
    write_words(path, counts, words, metadata)


def load_margins(mask_file: Path, masks: str) -> FileMargins:
    """Open the margins of a mask file, and check header and sizes.

    Args:
        mask_file: the mask file.
        masks: ``content_sha256`` of its masks.

    Raises:
        ArtifactError: there are no margins, they are torn, or they belong to other masks.
    """
    path = margins_path(mask_file)
    if not os.path.lexists(path):
        raise ArtifactError(path, f"is missing: {mask_file} comes without margins", NONE)
    try:
        handle = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise wrong_file(path, "a file of margins", FIX, error) from error
    meta = _read_header(path, (handle.metadata() or {}).get("megamask"))
    if meta["masks"] != masks:
        raise ArtifactError(path, f"belongs to other masks than those of {mask_file}", FIX)
    try:
        margins = FileMargins(path, handle, meta)
        _check_sizes(margins, handle)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise misfit(path, error, FIX) from error
    return margins


def _read_header(path: Path, text: str | None) -> dict[str, Any]:
    try:
        meta = json.loads(text or "")
    except (ValueError, RecursionError):
        raise ArtifactError(path, "is no file of margins", FIX) from None
    if problem := lacks(meta, FACTS):
        raise ArtifactError(path, f"has a header that {problem}", FIX)
    known: tuple[Any, Any] = (KIND, FORMAT_VERSION)
    if (meta["kind"], meta["format_version"]) != known:
        found = f"{meta['kind']} of version {meta['format_version']}"
        problem = f"holds {found}, this megamask reads {KIND} of version {FORMAT_VERSION}"
        raise ArtifactError(path, problem, FIX)
    check_tensors(path, meta, FIX)
    return dict(meta)


def _check_sizes(margins: FileMargins, handle: Any) -> None:
    """Raises ValueError where the file and the header disagree."""
    if set(handle.keys()) != set(margins):
        raise ValueError("other tensors are in the file than in the header")
    for name, fact in margins.meta["tensors"].items():
        rows, columns = fact["shape"]
        stored = handle.get_slice(name)
        words = codec.num_words(rows * columns, LEVELS)
        if stored.get_dtype() != "U64" or stored.get_shape() != [words]:
            raise ValueError(f"{name} cannot hold the margins of {rows} x {columns} weights")
