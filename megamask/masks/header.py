"""The JSON header of a mask file: its format, its checks and its checksum.

The header (metadata key ``megamask``) holds:

- format_version, pattern, candidate_order, axis: how the packed words are read; in format version
  4, of masks of several patterns, pattern is the text of all;
- fingerprint: the base model of the masks; float16_fingerprints, its copies rounded to fp16;
- method, data, evaluation: how the masks were made, from what, and how good they are;
- megamask: the version that wrote the file;
- tensors: name -> shape (O, I) of the mask and sha256 of its packed words; in format version 3
  also its coding (``codings``) and mask_sha256, the sha256 of the words of version 1; in version 4
  its pattern, and where it is coded also these two;
- sha256: digest of the rest of the header, because the same words mean other masks under another
  pattern.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.errors import ArgumentError, ArtifactError
from megamask.masks.codings import CODED
from megamask.sparsity.pattern import CANDIDATE_ORDER, Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.storage import lacks

FORMAT_VERSION = 1
PAIRS_VERSION = 2  # of a file with a pattern of pairs, which readers of version 1 do not know
CODED_VERSION = 3  # with a coding for each tensor, see ``codings``
MIXED_VERSION = 4  # with a pattern for each tensor, and a coding where it is not ``words``
AXIS = "in_features"
UPDATED = "updated"  # the header of masks that belong to weights of their own
FIX = "Make the mask file again, or copy it again from where it came."
REQUIRED: dict[str, type] = {
    "pattern": str,
    "fingerprint": str,
    "method": str,
    "tensors": dict,
    "megamask": str,
}


@dataclass(frozen=True)
class Facts:
    """What a header says beside the masks; the arguments of ``masks.file.save_masks`` of these
    names.
    """

    fingerprint: str
    method: str
    data: Any = None
    evaluation: Any = None
    updated_weights: bool = False
    float16_fingerprints: Sequence[str] = ()


def read_header(path: Path, text: str | None) -> dict[str, Any]:
    """The header of a mask file.

    Args:
        path: the file, for messages.
        text: the value of the metadata key ``megamask``; None if there is no such key.

    Raises:
        ArtifactError: the header is missing, damaged, of another format, or lacks a fact.
    """
    if text is None:
        raise ArtifactError(
            path,
            "is a safetensors file but not a mask file, such as a model's weights",
            "Name a file that megamask wrote: RUN/masks/NAME.safetensors.",
        )
    try:
        meta = json.loads(text)
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(path, f"has a broken header ({error!r})", FIX) from None
    if type(version) is not int or not FORMAT_VERSION <= version <= MIXED_VERSION:
        raise ArtifactError(
            path,
            f"has format version {version}, this megamask reads {FORMAT_VERSION} to "
            f"{MIXED_VERSION}",
            "Install a newer megamask.",
        )
    for key, value in (("candidate_order", CANDIDATE_ORDER), ("axis", AXIS)):
        if meta.get(key) != value:
            raise ArtifactError(
                path, f"has {key} {meta.get(key)!r}, this megamask reads {value!r}", FIX
            )
    if problem := lacks(meta, REQUIRED):
        raise ArtifactError(path, f"{problem}, in its header", FIX)
    check_tensors(path, meta, FIX)
    _check_codings(path, meta)
    _check_patterns(path, meta)
    return dict(meta)


def _check_patterns(path: Path, meta: Mapping[str, Any]) -> None:
    """Check that version 4, and no other, names the pattern of every tensor.

    Raises:
        ArtifactError: a pattern is missing, or is there in another version, whose readers would
            take the pattern of the header.
    """
    is_mixed = meta["format_version"] == MIXED_VERSION
    for name, about in meta["tensors"].items():
        if is_mixed and (problem := lacks(about, {"pattern": str})):
            raise ArtifactError(path, f"{problem} for {name}, in its header", FIX)
        if not is_mixed and "pattern" in about:
            problem = f"has a pattern for {name}, in a header of one pattern"
            raise ArtifactError(path, problem, FIX)


def _check_codings(path: Path, meta: Mapping[str, Any]) -> None:
    """Check that version 3 names the coding and the mask of every tensor, version 4 both or
    neither, and no other version either of them.

    Raises:
        ArtifactError: a coding is missing or unknown, or is there in another version. A
            ``mask_sha256`` that nothing compares would pass one mask off as another.
    """
    keys, version = ("coding", "mask_sha256"), meta["format_version"]
    for name, about in meta["tensors"].items():
        is_coded = version == CODED_VERSION
        is_coded |= version == MIXED_VERSION and any(key in about for key in keys)
        for key in keys:
            if not is_coded and key in about:
                problem = f"has a {key} for {name}, in a header without codings"
                raise ArtifactError(path, problem, FIX)
        if is_coded and (problem := lacks(about, {"coding": str, "mask_sha256": str})):
            raise ArtifactError(path, f"{problem} for {name}, in its header", FIX)
        if is_coded and about["coding"] not in CODED:
            problem = (
                f"has the coding {about['coding']!r} for {name}; known are {' and '.join(CODED)}"
            )
            raise ArtifactError(path, problem, "Install a newer megamask.")


def check_tensors(path: Path, meta: Mapping[str, Any], fix: str) -> None:
    """Check what a header says of its tensors, and its own checksum.

    Raises:
        ArtifactError: a shape is no (O, I), a checksum is missing, or the header was changed.
    """
    for name, about in meta["tensors"].items():
        if problem := lacks(about, {"shape": list, "sha256": str}, f"tensors.{name}"):
            raise ArtifactError(path, f"{problem}, in its header", fix)
        shape = about["shape"]
        if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
            raise ArtifactError(path, f"has the shape {shape} for {name}, in its header", fix)
    if meta.get("sha256") != header_digest(meta):
        raise ArtifactError(path, "has a corrupt header: the checksum does not match", fix)


def misfit(path: Path, error: BaseException, fix: str) -> ArtifactError:
    """The error of a file whose header names other data than the file holds."""
    return ArtifactError(path, f"has a header that does not fit its data ({error})", fix)


def plan_of(meta: Mapping[str, Any]) -> PatternPlan:
    """The patterns of the masks of a header.

    Raises:
        ConfigError: a text is no pattern.
        ValueError: the patterns of the tensors are not those that the header has as a whole.
    """
    tensors = meta["tensors"]
    if meta.get("format_version") != MIXED_VERSION:
        return PatternPlan.uniform([*tensors], Pattern.parse(meta["pattern"]))
    texts = {name: about["pattern"] for name, about in tensors.items()}
    known = {text: Pattern.parse(text) for text in dict.fromkeys(texts.values())}
    plan = PatternPlan({name: known[text] for name, text in texts.items()})
    if str(plan) != meta["pattern"]:
        raise ValueError(f"its masks are {plan}, its header says {meta['pattern']}")
    return plan


def header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 of a header without its own checksum."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def plain(name: str, value: Any) -> Any:
    """The value as JSON returns it, so that the hash covers the header that a reader gets."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (ValueError, TypeError, RecursionError) as error:
        allowed = f"values that JSON can hold ({error})"
        raise ArgumentError(f"save_masks: {name}", value, allowed) from None
