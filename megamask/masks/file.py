"""The mask file: a safetensors container with one packed tensor per HF linear and a JSON header.

``masks/header.py`` lists the keys of the header.

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

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamask.config.paths import margins_path
from megamask.errors import ArgumentError, ArtifactError, ConfigError
from megamask.file_kinds import require_file, wrong_file
from megamask.masks import codec
from megamask.masks.arguments import (
    as_choice,
    as_flag,
    as_path,
    as_plan,
    as_seconds,
    as_text,
    as_texts,
    checked_masks,
)
from megamask.masks.base_weights import GIVE, LACKS, UNCHANGED, Weights, weights_of
from megamask.masks.codings import CODINGS, GIVEN_WEIGHTS, WORDS, check_sizes, coding_of, decode
from megamask.masks.header import FIX, UPDATED, Facts, misfit, plan_of, read_header
from megamask.masks.margins import Margins, load_margins
from megamask.masks.save import save_coded, save_words
from megamask.masks.shapes_fit import check_patterns, check_shapes
from megamask.masks.times import note_seconds
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.storage import require_writable

UPDATING_METHODS = ("sparsegpt_update",)  # files of version 0.1.0 do not say so themselves
MASK_FILE = "a mask file"
MISSING = "Check the path, or run the verb that makes the mask (prune or learn)."


class MaskSet(Mapping[str, Tensor]):
    """The masks of a file: HF module name -> bool (O, I), True = keep.

    A mask is decoded when it is read from the mapping.

    Attributes:
        path: the file.
        patterns: the N:M pattern of each mask.
        fingerprint: fingerprint of the base model.
        method: name of the method that made the masks.
        meta: the whole header.
    """

    __eq__, __hash__ = object.__eq__, object.__hash__  # a Mapping compares values: tensors

    def __init__(self, path: Path, handle: Any, meta: dict[str, Any], plan: PatternPlan) -> None:
        self.path, self.meta, self._handle, self.patterns = path, meta, handle, plan
        self.fingerprint: str = meta["fingerprint"]
        self.method: str = meta["method"]
        self._weights: Weights | None = None

    @property
    def pattern(self) -> Pattern:
        """The pattern of all masks.

        Raises:
            ArtifactError: there are several.
        """
        if (only := self.patterns.only) is None:
            problem = f"holds masks of several patterns, {self.patterns}, and one is needed"
            raise ArtifactError(self.path, problem, "Use a mask of one pattern.")
        return only

    @property
    def needs_weights(self) -> bool:
        """Whether masks are stored as differences from the weights of their base model."""
        return GIVEN_WEIGHTS in (coding_of(about) for about in self.meta["tensors"].values())

    @property
    def lacks_weights(self) -> bool:
        """Whether masks need weights that were not given."""
        return self._weights is None and self.needs_weights

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
        return self.patterns[name].mask_of(self.narrow_index(name))

    def __contains__(self, name: object) -> bool:  # that of a Mapping decodes the mask
        return name in self.meta["tensors"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta["tensors"])

    def __len__(self) -> int:
        return len(self.meta["tensors"])

    def shape(self, name: str) -> tuple[int, int]:
        """(O, I) of a mask, without decoding it."""
        rows, columns = self.meta["tensors"][name]["shape"]
        return rows, columns

    def density_of(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """``PatternPlan.density_of``, with the shapes (O, I) of all linears that may be pruned."""
        return self.patterns.density_of(shapes)

    def index(self, name: str) -> Tensor:
        """Candidate index of every group, (O, G) int64. Raises as ``narrow_index``."""
        return self.narrow_index(name).long()

    def narrow_index(self, name: str) -> Tensor:
        """``index`` in the smallest integers without a sign that hold it, as it was decoded.

        Raises:
            KeyError: there is no mask of that name.
            ArtifactError: the packed data is corrupt.
        """
        words, about, weight = self._words(name), self.meta["tensors"][name], None
        if coding_of(about) == GIVEN_WEIGHTS:
            if self._weights is None:
                raise ArtifactError(self.path, LACKS, GIVE)
            weight = self._weights(name)
        try:
            index = decode(words, about, self.patterns[name], weight)
        except ValueError as error:
            if weight is None:
                raise ArtifactError(self.path, f"mask of {name} is corrupt: {error}", FIX) from None
            problem = f"mask of {name} does not fit the weights of the model: {error}"
            raise ArtifactError(self.path, problem, UNCHANGED) from None
        rows, columns = self.shape(name)
        return torch.from_numpy(index).view(rows, columns // self.patterns[name].m)

    def _words(self, name: str) -> codec.Words:
        words: codec.Words = self._handle.get_tensor(name)
        if hashlib.sha256(words.tobytes()).hexdigest() != self.meta["tensors"][name]["sha256"]:
            problem = f"mask of {name} is corrupt: the checksum does not match"
            raise ArtifactError(self.path, problem, FIX)
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
        said = [self.patterns.facts(), facts]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def has_margins(self) -> bool:  # whether a file of them lies beside the mask file
        return os.path.lexists(margins_path(self.path))

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
            self.narrow_index(name)

    def check(
        self,
        *,
        plan: PatternPlan | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Check that the masks fit a run or a model. An argument that is None is not checked.

        Args:
            plan: the patterns that the masks must have; linears that are dense in one of the two
                plans are not compared.
            shapes: HF module name -> (O, I) of the model's linears. A linear without a mask is
                dense.
            fingerprint: fingerprint of the model.

        Raises:
            ArtifactError: the first fact that does not fit.
        """
        if plan is not None:
            check_patterns(self.path, self.patterns, plan)
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
    pattern: Pattern | str | Mapping[str, Pattern | str],
    *,
    fingerprint: str,
    method: str,
    data: Any = None,
    evaluation: Any = None,
    updated_weights: bool = False,
    float16_fingerprints: Sequence[str] = (),
    coding: str = WORDS,
    model: Any = None,
    seconds: float | None = None,
) -> None:
    """Write a mask file atomically.

    Args:
        path: the file.
        masks: HF module name -> bool or 0/1 mask (O, I), 1 = keep, any device.
        pattern: the pattern of every mask, as text (``"2:4"``) or parsed; or a mapping from the
            names of the masks to their patterns, which makes format version 4.
        fingerprint, method: of the base model, and the name of the method that made the masks.
        data: settings and text that the masks were made from, as JSON values.
        evaluation: measured quality of the masks, as JSON values.
        updated_weights: whether the method changed the kept weights, to which the masks belong.
        float16_fingerprints: fingerprints of the base model's copies in fp16.
        coding: ``words`` (format version 1, which every megamask reads), ``uniform`` or the by far
            smallest, ``given-weights``, read with the base model alone (version 3, ``codings``).
        model: the base model, loaded or as a Hugging Face folder, for ``given-weights``.
        seconds: that the masks took, for tables; None forgets those of an earlier file.

    Raises:
        ArgumentError: an argument has another type, or a mask is not (O, I) or does not keep
            exactly n of every m. The error is a ValueError and a TypeError too.
        ArtifactError: the path is a folder, or cannot be written.
    """
    file, plan = as_path("save_masks: path", path), as_plan("save_masks: pattern", pattern, masks)
    if os.path.isdir(file):
        raise ArtifactError(file, "is a folder", "Name the file to write.")
    fingerprint = as_text("save_masks: fingerprint", fingerprint)
    method = as_text("save_masks: method", method)
    copies = as_texts("save_masks: float16_fingerprints", float16_fingerprints)
    as_flag("save_masks: updated_weights", updated_weights)
    seconds = as_seconds("save_masks: seconds", seconds)
    coding = as_choice("save_masks: coding", coding, CODINGS)
    if coding == GIVEN_WEIGHTS and model is None:
        allowed = f"the base model is needed for the coding {coding}"
        raise ArgumentError("save_masks: model", model, allowed)
    packed: dict[str, codec.Words] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, mask_OI in checked_masks("save_masks: masks", masks):
        own = plan[name]
        try:
            bits = own.bits_of(mask_OI).cpu()
            packed[name] = codec.pack(bits, own.num_candidates, own.index_of_bits)
        except ValueError:
            allowed = f"{own} keeps exactly {own.in_words} of a row"
            raise ArgumentError(f"save_masks: masks[{name!r}]", mask_OI, allowed) from None
        shapes[name] = tuple(mask_OI.shape)
    require_writable(file.parent, "the path")
    facts = Facts(fingerprint, method, data, evaluation, updated_weights, copies)
    known, given = (fingerprint, *copies), coding == GIVEN_WEIGHTS
    weights = weights_of("save_masks: model", model, file, shapes, known) if given else None
    note_seconds(file, seconds)
    if coding == WORDS:
        return save_words(file, shapes, packed.items(), plan, facts)
    index = (
        (name, codec.unpack(words, math.prod(shapes[name]) // own.m, own.num_candidates))
        for name, words in packed.items()
        for own in [plan[name]]
    )
    save_coded(file, shapes, index, plan, facts, weights)


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
        masks = MaskSet(path, handle, meta, plan_of(meta))
        check_sizes(meta["tensors"], masks.patterns, handle)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise misfit(path, error, FIX) from error
    if model is None:
        return masks
    shapes = {name: masks.shape(name) for name in masks}
    weights = weights_of("load_masks: model", model, path, shapes, masks.fingerprints)
    return masks.with_weights(weights)
