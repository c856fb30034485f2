"""How the masks of a file are stored. Versions 1 and 2 have words of digits (``codec``). Version 3
names a coding for every linear, and version 4, of several patterns, may:

- ``uniform``: fields of digits, which waste less than 0.3 % (``radix``);
- ``given-weights``: differences from the magnitudes of the base model's weights (``ranked``). A
  linear of a pattern without such a model, or whose words would not be fewer, is ``uniform``.

Shapes: O out_features, I in_features, G groups per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megamask.masks import codec, radix, ranked
from megamask.masks.codec import Words
from megamask.masks.radix import Index
from megamask.sparsity.pattern import Pattern

WORDS, UNIFORM, GIVEN_WEIGHTS = "words", "uniform", "given-weights"
CODINGS = (WORDS, UNIFORM, GIVEN_WEIGHTS)
CODED = (UNIFORM, GIVEN_WEIGHTS)  # of a linear in version 3


def coding_of(about: Mapping[str, Any]) -> str:
    """The coding of a linear, from its entry in the header."""
    return str(about.get("coding", WORDS))


def encode(index: Index, pattern: Pattern, weight_OI: Tensor | None) -> tuple[str, Words]:
    """A coding of version 3 and its words.

    Args:
        index: candidate indices (O * G,).
        pattern: their pattern.
        weight_OI: the weight of the base model; None where the coding must not need it.
    """
    plain = radix.pack(index, pattern.num_candidates)
    if weight_OI is not None and ranked.has_model(pattern):
        words = ranked.encode(index, ranked.keys_of(weight_OI), pattern)
        if len(words) < len(plain):
            return GIVEN_WEIGHTS, words
    return UNIFORM, plain


def decode(
    words: Words, about: Mapping[str, Any], pattern: Pattern, weight_OI: Tensor | None
) -> Index:
    """Candidate indices (O * G,) of a linear, whose checksum was compared where there is one.

    Args:
        words: as the file holds them.
        about: the entry of the linear in the header.
        pattern: of the masks.
        weight_OI: the weight of the base model, needed by ``given-weights`` alone.

    Raises:
        ValueError: the words are none of the coding, or decode to another mask than was written.
    """
    coding, (rows, columns) = coding_of(about), about["shape"]
    groups = rows * (columns // pattern.m)
    if coding == GIVEN_WEIGHTS:
        assert weight_OI is not None
        if tuple(weight_OI.shape) != (rows, columns):
            raise ValueError(f"the weight has the shape {tuple(weight_OI.shape)}")
        index = ranked.decode(words, ranked.keys_of(weight_OI), pattern)
    else:
        read = codec if coding == WORDS else radix
        index = read.unpack(words, groups, pattern.num_candidates)
    if coding != WORDS and mask_digest(index, pattern) != about["mask_sha256"]:
        raise ValueError("the checksum of the mask does not match")
    return index


def check_sizes(
    tensors: Mapping[str, Mapping[str, Any]], plan: Mapping[str, Pattern], handle: Any
) -> None:
    """Check that a file stores exactly the masks of its header, each in as many words as it may.

    Args:
        tensors: the entries of the linears in the header.
        plan: the pattern of each mask.
        handle: the open safetensors file.

    Raises:
        ValueError: the file and the header disagree.
    """
    names = set(handle.keys())
    if names != set(tensors):
        some = sorted(names ^ set(tensors))[:3]
        raise ValueError(f"tensors {some} are in the file or in the header, not in both")
    for name, about in tensors.items():
        (rows, columns), pattern = about["shape"], plan[name]
        stored = handle.get_slice(name)
        groups, dtype, shape = rows * (columns // pattern.m), stored.get_dtype(), stored.get_shape()
        is_list = dtype == "U64" and len(shape) == 1 and columns % pattern.m == 0
        if not is_list or _wrong_size(coding_of(about), shape[0], groups, pattern):
            raise ValueError(
                f"{name}: {dtype} {shape} cannot hold a {pattern} mask of {rows} x {columns}"
            )


def _wrong_size(coding: str, stored: int, groups: int, pattern: Pattern) -> bool:
    """Whether ``groups`` groups cannot be coded in ``stored`` words."""
    base = pattern.num_candidates
    if coding == GIVEN_WEIGHTS:
        return not ranked.has_model(pattern) or not 0 < stored < radix.num_words(groups, base)
    return stored != (codec if coding == WORDS else radix).num_words(groups, base)


def mask_digest(index: Index, pattern: Pattern) -> str:
    """SHA-256 of the words of the coding ``words``, which is the same in all codings of a mask."""
    return hashlib.sha256(codec.pack(index, pattern.num_candidates).tobytes()).hexdigest()
