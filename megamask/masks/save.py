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
    MIXED_VERSION,
    PAIRS_VERSION,
    UPDATED,
    Facts,
    header_digest,
    plain,
)
from megamask.masks.radix import Index
from megamask.sparsity.pattern import CANDIDATE_ORDER, Pattern
from megamask.sparsity.pattern_plan import PatternPlan


def save_codes(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    codes: Iterable[tuple[str, Tensor]],
    index_of: Callable[[Tensor, Pattern], Any],
    plan: PatternPlan,
    facts: Facts,
) -> None:
    """Write a mask file atomically, with the codes of one linear in memory at a time.

    Args:
        path: the file.
        shapes: HF module name -> (O, I) of every mask, in the order of the header.
        codes: HF module name and a number for every group, (O, G) on the CPU, of every mask, in
            any order.
        index_of: candidate indices of such numbers, of a linear with a pattern.
        plan: the pattern of every mask.
        facts: of the header.

    Raises:
        ValueError: a number is none of the pattern.
    """

    def packed(name: str, numbers: Tensor) -> codec.Words:
        pattern = plan[name]
        return codec.pack(numbers, pattern.num_candidates, lambda some: index_of(some, pattern))

    save_words(path, shapes, ((name, packed(name, one)) for name, one in codes), plan, facts)


def save_words(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    words: Iterable[tuple[str, codec.Words]],
    plan: PatternPlan,
    facts: Facts,
) -> None:
    """Write a mask file atomically.

    Args:
        path: the file.
        shapes: HF module name -> (O, I) of every mask, in the order of the header.
        words: HF module name and packed indices of every mask, in any order.
        plan: the pattern of every mask.
        facts: of the header.
    """
    plan = PatternPlan({name: plan[name] for name in shapes})
    counts = _counts(shapes, plan, codec.num_words)
    has_pairs = any(pattern.unit > 1 for pattern in plan.distinct)
    header = _header(PAIRS_VERSION if has_pairs else FORMAT_VERSION, plan, facts)

    def metadata(digests: Mapping[str, str]) -> str:
        tensors = {
            name: {"shape": list(shape), "sha256": digests[name], **_own_pattern(plan, name)}
            for name, shape in shapes.items()
        }
        return _text(header, tensors)

    write_words(path, counts, words, metadata)


def save_coded(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    index: Iterable[tuple[str, Index]],
    plan: PatternPlan,
    facts: Facts,
    weights: Weights | None,
) -> None:
    """Write a mask file with a coding of each linear atomically, with one mask in memory at a time.

    Args:
        path: the file.
        shapes: HF module name -> (O, I) of every mask, in the order of the header.
        index: HF module name and candidate indices (O * G,) of every mask, in any order.
        plan: the pattern of every mask.
        facts: of the header.
        weights: those of the base model, for the coding ``given-weights``; None for ``uniform``.
    """
    plan = PatternPlan({name: plan[name] for name in shapes})
    counts = _counts(shapes, plan, radix.num_words)
    header = _header(CODED_VERSION, plan, facts)
    longest = {"coding": max(CODED, key=len), "mask_sha256": "0" * 64}
    about: dict[str, dict[str, str]] = {name: longest for name in shapes}

    def coded() -> Iterator[tuple[str, codec.Words]]:
        for name, one in index:
            own, weight_OI = plan[name], None if weights is None else weights(name)
            coding, words = encode(one, own, weight_OI)
            about[name] = {"coding": coding, "mask_sha256": mask_digest(one, own)}
            yield name, words

    def metadata(digests: Mapping[str, str]) -> str:
        tensors = {
            name: {
                "shape": list(shape),
                "sha256": digests[name],
                **about[name],
                **_own_pattern(plan, name),
            }
            for name, shape in shapes.items()
        }
        return _text(header, tensors)

    write_words(path, counts, coded(), metadata, at_most=True)


def _counts(
    shapes: Mapping[str, tuple[int, ...]], plan: PatternPlan, num_words: Callable[[int, int], int]
) -> dict[str, int]:
    """HF module name -> words of its mask, of which ``num_words`` take so many groups of so many
    candidates.
    """
    return {
        name: num_words(rows * (columns // plan[name].m), plan[name].num_candidates)
        for name, (rows, columns) in shapes.items()
    }


def _own_pattern(plan: PatternPlan, name: str) -> dict[str, str]:
    """What the entry of a linear says of its pattern, where linears have several."""
    return {} if plan.only is not None else {"pattern": str(plan[name])}


def _header(version: int, plan: PatternPlan, facts: Facts) -> dict[str, Any]:
    """The header without its tensors; ``version`` is that of a plan of one pattern."""
    copies = list(facts.float16_fingerprints)
    return {
        "format_version": version if plan.only is not None else MIXED_VERSION,
        "megamask": __version__,
        "pattern": str(plan),
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
