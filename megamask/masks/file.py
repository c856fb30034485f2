"""The mask file: a safetensors container with one packed tensor per HF linear and a JSON header.

The header (metadata key ``megamask``) holds:

- format_version, pattern, candidate_order, axis: how the packed words are read;
- fingerprint: the base model of the masks; float16_fingerprints, its copies rounded to fp16;
- method, data, evaluation: how the masks were made, from what, and how good they are;
- megamask: the version that wrote the file;
- tensors: name -> shape (O, I) of the mask and sha256 of its packed words; in format version 3
  also its coding (``codings``) and mask_sha256, the sha256 of the words of version 1;
- sha256: digest of the rest of the header, because the same words mean other masks under another
  pattern.

Shapes: O out_features, I in_features, G groups per row.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
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
    as_choice,
    as_flag,
    as_path,
    as_pattern,
    as_text,
    as_texts,
    checked_masks,
)
from megamask.masks.base_weights import GIVE, LACKS, UNCHANGED, Weights, weights_of
from megamask.masks.codings import (
    CODINGS,
    GIVEN_WEIGHTS,
    WORDS,
    check_sizes,
    coding_of,
    decode,
)
from megamask.masks.header import FIX, UPDATED, Facts, misfit, read_header
from megamask.masks.margins import Margins, load_margins
from megamask.masks.radix import Index
from megamask.masks.save import save_coded, save_words
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
        self._weights: Weights | None = None

    @property
    def lacks_weights(self) -> bool:
        """Whether masks are stored as differences from weights that were not given."""
        codings = (coding_of(about) for about in self.meta["tensors"].values())
        return self._weights is None and GIVEN_WEIGHTS in codings

    def with_weights(self, weights: Weights) -> MaskSet:
        """These masks, with the weights of their base model at hand."""
        other = copy.copy(self)
        other._weights = weights
        return other

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
        index = self._decoded(name).astype(np.int64)
        return torch.from_numpy(index).view(rows, columns // self.pattern.m)

    def _decoded(self, name: str) -> Index:
        """Candidate indices (O * G,), whose checksum was compared."""
        words, about, weight = self._words(name), self.meta["tensors"][name], None
        if coding_of(about) == GIVEN_WEIGHTS:
            if self._weights is None:
                raise ArtifactError(self.path, LACKS, GIVE)
            weight = self._weights(name)
        try:
            return decode(words, about, self.pattern, weight)
        except ValueError as error:
            if weight is None:
                raise ArtifactError(self.path, f"mask of {name} is corrupt: {error}", FIX) from None
            problem = f"mask of {name} does not fit the weights of the model: {error}"
            raise ArtifactError(self.path, problem, UNCHANGED) from None

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
        digests = {name: one.get("mask_sha256", one["sha256"]) for name, one in tensors.items()}
        facts = [[name, list(self.shape(name)), digests[name]] for name in sorted(self)]
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
            raise ArtifactError(self.path, problem, UNCHANGED)


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
    coding: str = WORDS,
    model: Any = None,
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
        coding: ``words`` (format version 1, which every megamask reads), ``uniform`` or
            ``given-weights`` (version 3, see ``codings``; the last is by far the smallest, and is
            read with the base model alone).
        model: the base model, loaded or as a Hugging Face folder, for ``given-weights``.

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
    coding = as_choice("save_masks: coding", coding, CODINGS)
    if coding == GIVEN_WEIGHTS and model is None:
        allowed = f"the base model is needed for the coding {coding}"
        raise ArgumentError("save_masks: model", model, allowed)
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
    if coding == WORDS:
        return save_words(file, shapes, packed.items(), pattern, facts)
    weights = None
    if coding == GIVEN_WEIGHTS:
        known = (fingerprint, *copies)
        weights = weights_of("save_masks: model", model, file, shapes, known)
    index = (
        (name, codec.unpack(words, math.prod(shapes[name]) // pattern.m, pattern.num_candidates))
        for name, words in packed.items()
    )
    save_coded(file, shapes, index, pattern, facts, weights)


def load_masks(path: Path | str, model: Any = None) -> MaskSet:
    """Open a mask file and check its header.

    A mask is decoded, and its checksum compared, when it is read from the result.

    Args:
        path: the file.
        model: the base model, loaded or as a Hugging Face folder. Masks of the coding
            ``given-weights`` are read with its unpruned weights alone; others do not need it.

    Raises:
        ArgumentError: ``path`` is no path, or ``model`` no model.
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
        check_sizes(meta["tensors"], masks.pattern, handle)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise misfit(path, error, FIX) from error
    if model is None:
        return masks
    shapes = {name: masks.shape(name) for name in masks}
    return masks.with_weights(
        weights_of("load_masks: model", model, path, shapes, masks.fingerprints)
    )
