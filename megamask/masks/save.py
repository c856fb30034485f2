"""The writing of a mask file, linear by linear, from hard codes or from packed words.

Shapes: O out_features, I in_features, G groups per row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megamask import __version__
from megamask.masks import codec, radix
from megamask.masks.base_weights import Weights
from megamask.masks.codings import CODED, encode, mask_digest
from megamask.masks.container import write_words
from megamask.masks.header import (
    AXIS,
    CODED_VERSION,
    FORMAT_VERSION,
    PAIRS_VERSION,
    UPDATED,
    Facts,
    header_digest,
    plain,
)
from megamask.masks.radix import Index
from megamask.sparsity.pattern import CANDIDATE_ORDER, Pattern


def save_codes(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    codes: Iterable[tuple[str, Tensor]],
    index_of: Callable[[Tensor], Any],
    pattern: Pattern,
    facts: Facts,
) -> None:
    """Write a mask file atomically, with the codes of one linear in memory at a time.

    Args:
        path: the file.
        shapes: HF module name -> (O, I) of every mask, in the order of the header.
        codes: HF module name and a number for every group, (O, G) on the CPU, of every mask, in
            any order.
        index_of: candidate indices of such numbers.
        pattern: the pattern of every mask.
        facts: of the header.

    Raises:
        ValueError: a number is none of the pattern.
    """
    base = pattern.num_candidates
    words = ((name, codec.pack(numbers, base, index_of)) for name, numbers in codes)
    save_words(path, shapes, words, pattern, facts)


def save_words(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    words: Iterable[tuple[str, codec.Words]],
    pattern: Pattern,
    facts: Facts,
) -> None:
    """Write a mask file atomically.

    Args:
        path: the file.
        shapes: HF module name -> (O, I) of every mask, in the order of the header.
        words: HF module name and packed indices of every mask, in any order.
        pattern: the pattern of every mask.
        facts: of the header.
    """
    counts = {
        name: codec.num_words(rows * (columns // pattern.m), pattern.num_candidates)
        for name, (rows, columns) in shapes.items()
    }
    version = FORMAT_VERSION if pattern.unit == 1 else PAIRS_VERSION
    header = _header(version, pattern, facts)

    def metadata(digests: Mapping[str, str]) -> str:
        tensors = {
            name: {"shape": list(shape), "sha256": digests[name]} for name, shape in shapes.items()
        }
        return _text(header, tensors)

    write_words(path, counts, words, metadata)


def save_coded(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    index: Iterable[tuple[str, Index]],
    pattern: Pattern,
    facts: Facts,
    weights: Weights | None,
) -> None:
    """Write a mask file of format version 3 atomically, with one mask in memory at a time.

    Args:
        path: the file.
        shapes: HF module name -> (O, I) of every mask, in the order of the header.
        index: HF module name and candidate indices (O * G,) of every mask, in any order.
        pattern: the pattern of every mask.
        facts: of the header.
        weights: those of the base model, for the coding ``given-weights``; None for ``uniform``.
    """
    counts = {
        name: radix.num_words(rows * (columns // pattern.m), pattern.num_candidates)
        for name, (rows, columns) in shapes.items()
    }
    header = _header(CODED_VERSION, pattern, facts)
    longest = {"coding": max(CODED, key=len), "mask_sha256": "0" * 64}
    about: dict[str, dict[str, str]] = {name: longest for name in shapes}

    def coded() -> Iterator[tuple[str, codec.Words]]:
        for name, one in index:
            coding, words = encode(one, pattern, None if weights is None else weights(name))
            about[name] = {"coding": coding, "mask_sha256": mask_digest(one, pattern)}
            yield name, words

    def metadata(digests: Mapping[str, str]) -> str:
        tensors = {
            name: {"shape": list(shape), "sha256": digests[name], **about[name]}
            for name, shape in shapes.items()
        }
        return _text(header, tensors)

    write_words(path, counts, coded(), metadata, at_most=True)


def _header(version: int, pattern: Pattern, facts: Facts) -> dict[str, Any]:
    """The header without its tensors."""
    copies = list(facts.float16_fingerprints)
    return {
        "format_version": version,
        "megamask": __version__,
        "pattern": str(pattern),
        "candidate_order": CANDIDATE_ORDER,
        "axis": AXIS,
        "fingerprint": facts.fingerprint,
        "method": facts.method,
        "data": plain("data", facts.data),
        "evaluation": plain("evaluation", facts.evaluation),
        "tensors": {},
        **({"weights": UPDATED} if facts.updated_weights else {}),
        **({"float16_fingerprints": copies} if copies else {}),
    }


def _text(header: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """The header with its tensors and its checksum, as JSON."""
    whole = {**header, "tensors": tensors}
    return json.dumps({**whole, "sha256": header_digest(whole)})
