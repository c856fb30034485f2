"""The writing of a mask file, linear by linear, from hard codes or from packed words.

Shapes: O out_features, I in_features, G groups per row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megamask import __version__
from megamask.masks import codec
from megamask.masks.container import write_words
from megamask.masks.header import (
    AXIS,
    FORMAT_VERSION,
    PAIRS_VERSION,
    UPDATED,
    Facts,
    header_digest,
    plain,
)
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
    copies = list(facts.float16_fingerprints)
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION if pattern.unit == 1 else PAIRS_VERSION,
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

    def metadata(digests: Mapping[str, str]) -> str:
        header["tensors"] = {
            name: {"shape": list(shape), "sha256": digests[name]} for name, shape in shapes.items()
        }
        return json.dumps({**header, "sha256": header_digest(header)})

    write_words(path, counts, words, metadata)
