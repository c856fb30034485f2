"""The mask file: a safetensors container with one packed tensor per HF linear and a JSON header.

The header (metadata key ``megamask``) holds:

- format_version, pattern, candidate_order, axis: how the packed words are read;
- fingerprint: the base model of the masks; float16_fingerprints, its copies rounded to fp16;
- method, data, evaluation: how the masks were made, from what, and how good they are;
- megamask: the version that wrote the file;
- tensors: name -> shape (O, I) of the mask and sha256 of its packed words;
- sha256: digest of the rest of the header, because the same words mean other masks under another
  pattern.

Shapes: O out_features, I in_features, G groups per row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamask.errors import ArgumentError, ArtifactError, ConfigError
from megamask.file_kinds import require_file, wrong_file
from megamask.masks import codec
from megamask.masks.arguments import (
    as_flag,
    as_path,
    as_pattern,
    as_text,
    as_texts,
    checked_masks,
)
from megamask.masks.header import FIX, UPDATED, Facts, misfit, read_header
from megamask.masks.margins import Margins, load_margins
from megamask.masks.save import save_words
from megamask.masks.shapes_fit import check_shapes
from megamask.sparsity.pattern import Pattern
from megamask.storage import require_writable

UPDATING_METHODS = ("sparsegpt_update",)  # files of version 0.1.0 do not say so themselves
MASK_FILE = "a mask file"
MISSING = "Check the path, or run the verb that makes the mask (prune or learn)."


class MaskSet(Mapping[str, Tensor]):
    """The masks of a file: HF module name -> bool (O, I), True = keep.

    A mask is decoded when it is read from the mapping.

    Attributes:
        path: the file.
        pattern: the N:M pattern of all masks.
        fingerprint: fingerprint of the base model.
        method: name of the method that made the masks.
        meta: the whole header.
    """

    def __init__(self, path: Path, handle: Any, meta: dict[str, Any]) -> None:
        self.path, self.meta, self._handle = path, meta, handle
        self.pattern = Pattern.parse(meta["pattern"])
        self.fingerprint: str = meta["fingerprint"]
        self.method: str = meta["method"]

    @property
    def has_own_weights(self) -> bool:
        """Whether the masks were made together with updated weights, and mean nothing without."""
        return self.meta.get("weights") == UPDATED or self.method in UPDATING_METHODS

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The fingerprints of the base model and of its copies in fp16, where they are known."""
        known = self.meta.get("float16_fingerprints")
        return (self.fingerprint, *map(str, known if isinstance(known, list) else ()))

    def __getitem__(self, name: str) -> Tensor:
        return self.pattern.mask_of(self.index(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta["tensors"])

    def __len__(self) -> int:
        return len(self.meta["tensors"])

    def shape(self, name: str) -> tuple[int, int]:
        """(O, I) of a mask, without decoding it."""
        rows, columns = self.meta["tensors"][name]["shape"]
        return rows, columns

    def density_of(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """The share of weights kept over all linears that may be pruned; linears without a mask
        are dense.

        Args:
            shapes: (O, I) of these linears.
        """
        weights = sum(rows * columns for rows, columns in shapes.values())
        masked = sum(rows * columns for rows, columns in map(self.shape, self))
        kept = masked * self.pattern.n // self.pattern.m  # whole groups
        return (weights - masked + kept) / weights

    def index(self, name: str) -> Tensor:
        """Candidate index of every group, (O, G) int64.

        Raises:
            KeyError: there is no mask of that name.
            ArtifactError: the packed data is corrupt.
        """
        rows, columns = self.shape(name)
        groups = columns // self.pattern.m
        try:
            index = codec.unpack(self._words(name), rows * groups, self.pattern.num_candidates)
        except ValueError as error:
            raise ArtifactError(self.path, f"mask of {name} is corrupt: {error}", FIX) from None
        return torch.from_numpy(index.astype(np.int64)).view(rows, groups)

    def _words(self, name: str) -> codec.Words:
        words: codec.Words = self._handle.get_tensor(name)
        if hashlib.sha256(words.tobytes()).hexdigest() != self.meta["tensors"][name]["sha256"]:
            raise ArtifactError(
                self.path, f"mask of {name} is corrupt: the checksum does not match", FIX
            )
        return words

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    @property
    def content_sha256(self) -> str:
        """Digest of pattern, names, shapes and masks, from the checksums of the header: equal for
        equal masks, however they were made and wherever they lie.
        """
        tensors = self.meta["tensors"]
        facts = [[name, list(self.shape(name)), tensors[name]["sha256"]] for name in sorted(self)]
        return hashlib.sha256(json.dumps([str(self.pattern), facts]).encode()).hexdigest()

    def margins(self) -> Margins:
        """The margins of the masks.

        Raises:
            ArtifactError: see :func:`megamask.masks.margins.load_margins`.
        """
        return load_margins(self.path, self.content_sha256)

    def check_whole(self) -> None:
        """Compare every checksum without decoding the masks.

        Raises:
            ArtifactError: the first mask that is corrupt.
        """
        for name in self:
            self._words(name)

    def verify(self) -> None:
        """Decode every mask once.

        Raises:
            ArtifactError: the first mask that is corrupt.
        """
        for name in self:
            self.index(name)

    def check(
        self,
        *,
        pattern: Pattern | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Check that the masks fit a run or a model. An argument that is None is not checked.

        Args:
            pattern: the pattern that the masks must have.
            shapes: HF module name -> (O, I) of the model's linears. A linear without a mask is
                dense.
            fingerprint: fingerprint of the model.

        Raises:
            ArtifactError: the first fact that does not fit.
        """
        if pattern is not None and pattern != self.pattern:
            fix = f"Set pattern={self.pattern}, or use a mask made for {pattern}."
            raise ArtifactError(self.path, f"holds {self.pattern} masks, wanted {pattern}", fix)
        if shapes is not None:
            check_shapes(self.path, {name: self.shape(name) for name in self}, shapes)
        if fingerprint is not None and fingerprint not in self.fingerprints:
            problem = (
                f"was made for another base model (fingerprint {self.fingerprint[:12]}, "
                f"the model has {fingerprint[:12]})"
            )
            fix = (
                "Use the model that the mask was made for, with its weights unpruned and unchanged."
            )
            raise ArtifactError(self.path, problem, fix)


def save_masks(
    path: Path | str,
    masks: Mapping[str, Tensor],
    pattern: Pattern | str,
    *,
    fingerprint: str,
    method: str,
    data: Any = None,
    evaluation: Any = None,
    updated_weights: bool = False,
    float16_fingerprints: Sequence[str] = (),
) -> None:
    """Write a mask file atomically.

    Args:
        path: the file.
        masks: HF module name -> bool or 0/1 mask (O, I), 1 = keep, any device.
        pattern: the pattern of every mask, as text (``"2:4"``) or parsed.
        fingerprint: fingerprint of the base model.
        method: name of the method that made the masks.
        data: settings and text that the masks were made from, as JSON values.
        evaluation: measured quality of the masks, as JSON values.
        updated_weights: whether the method also changed the kept weights, so that the masks belong
            to the changed weights.
        float16_fingerprints: fingerprints of the base model's copies in fp16.

    Raises:
        ArgumentError: an argument has another type, or a mask is not (O, I) or does not keep
            exactly n of every m. The error is a ValueError and a TypeError too.
        ArtifactError: the path is a folder, or cannot be written.
    """
    file, pattern = as_path("save_masks: path", path), as_pattern("save_masks: pattern", pattern)
    if os.path.isdir(file):
        raise ArtifactError(file, "is a folder", "Name the file to write.")
    fingerprint = as_text("save_masks: fingerprint", fingerprint)
    method = as_text("save_masks: method", method)
    copies = as_texts("save_masks: float16_fingerprints", float16_fingerprints)
    as_flag("save_masks: updated_weights", updated_weights)
    packed: dict[str, codec.Words] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, mask_OI in checked_masks("save_masks: masks", masks):
        try:
            bits = pattern.bits_of(mask_OI).cpu()
            packed[name] = codec.pack(bits, pattern.num_candidates, pattern.index_of_bits)
        except ValueError:
            allowed = f"{pattern} keeps exactly {pattern.in_words} of a row"
            raise ArgumentError(f"save_masks: masks[{name!r}]", mask_OI, allowed) from None
        shapes[name] = tuple(mask_OI.shape)
    require_writable(file.parent, "the path")
    facts = Facts(fingerprint, method, data, evaluation, updated_weights, copies)
    save_words(file, shapes, packed.items(), pattern, facts)


def load_masks(path: Path | str) -> MaskSet:
    """Open a mask file and check its header.

    A mask is decoded, and its checksum compared, when it is read from the result.

    Raises:
        ArgumentError: ``path`` is no path.
        ArtifactError: the file is missing, torn or no mask file, has another format version or
            candidate order, or its sizes do not fit. The message says what the file is instead.
    """
    path = as_path("load_masks: path", path)
    require_file(path, MASK_FILE, FIX if os.path.lexists(path) else MISSING)
    try:
        handle = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise wrong_file(path, MASK_FILE, FIX, error) from error
    meta = read_header(path, (handle.metadata() or {}).get("megamask"))
    try:
        masks = MaskSet(path, handle, meta)
        _check_sizes(masks, handle)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise misfit(path, error, FIX) from error
    return masks


def _check_sizes(masks: MaskSet, handle: Any) -> None:
    """Check that the file stores exactly the masks of the header, each in so many words.

    Raises:
        ValueError: the file and the header disagree.
    """
    names = set(handle.keys())
    if names != set(masks):
        some = sorted(names ^ set(masks))[:3]
        raise ValueError(f"tensors {some} are in the file or in the header, not in both")
    for name in masks:
        rows, columns = masks.shape(name)
        stored = handle.get_slice(name)
        words = codec.num_words(rows * (columns // masks.pattern.m), masks.pattern.num_candidates)
        dtype, shape = stored.get_dtype(), stored.get_shape()
        if columns % masks.pattern.m or dtype != "U64" or shape != [words]:
            raise ValueError(
                f"{name}: {dtype} {shape} cannot hold a {masks.pattern} mask of {rows} x {columns}"
            )
