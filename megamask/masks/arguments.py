"""Checks of what a caller hands to the public functions: one message for each wrong argument."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megamask import user_paths
from megamask.errors import ArgumentError, ConfigError
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.user_paths import with_home

LONGEST = 255  # bytes of a file name
LONGEST_TIME = 1e10  # seconds, three hundred years


def as_model(name: str, value: Any) -> nn.Module:
    """A model in memory. Raises ArgumentError for everything else."""
    if not isinstance(value, nn.Module):
        fix = "Load it first: transformers.AutoModelForCausalLM.from_pretrained(path)."
        raise ArgumentError(name, value, "a loaded model is needed", fix)
    return value


def as_path(name: str, value: Any) -> Path:
    """A path from text, in which ``~`` is a home folder, or from a path-like object.

    Args:
        name: the function and its argument, for the message.
        value: what was given.

    Raises:
        ArgumentError: it is something else, empty, or holds a zero character.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text or not _is_encodable(text, True):
        raise ArgumentError(name, value, "a path is needed, as text or pathlib.Path")
    if isinstance(value, str) and (text := with_home(value)) is None:
        raise ArgumentError(name, value, user_paths.ALLOWED, user_paths.FIX)
    if any(len(os.fsencode(part)) > LONGEST for part in Path(text).parts) or len(text) > 4000:
        raise ArgumentError(name, value, "the path is longer than file systems allow")
    return Path(text)


def as_text(name: str, value: Any) -> str:
    """Text. Raises ArgumentError for everything else."""
    if not isinstance(value, str):
        raise ArgumentError(name, value, "a text is needed")
    return value


def as_texts(name: str, value: Any) -> list[str]:
    """A list of texts. Raises ArgumentError for everything else."""
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return list(value)
    raise ArgumentError(name, value, "a list of texts is needed")


def as_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some texts. Raises ArgumentError for everything else."""
    if isinstance(value, str) and value in choices:
        return value
    raise ArgumentError(name, value, f"one of {', '.join(map(repr, choices))} is needed")


def as_flag(name: str, value: Any) -> bool:
    """True or False. Raises ArgumentError for everything else."""
    if not isinstance(value, bool):
        raise ArgumentError(name, value, "True or False is needed")
    return value


def as_seconds(name: str, value: Any) -> float | None:
    """A time of at least 0 seconds, or None. Raises ArgumentError for everything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (is_number and 0 <= value <= LONGEST_TIME):
        return None if value is None else float(value)
    raise ArgumentError(name, value, "a number of seconds or None is needed")


def as_pattern(name: str, value: Any) -> Pattern:
    """A pattern from a pattern or its text.

    Raises:
        ArgumentError: it is neither, or the text is no pattern that a mask file can hold.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        try:
            return Pattern.parse(value)
        except ConfigError as error:
            raise ArgumentError(name, value, error.allowed, error.fix) from None
    raise ArgumentError(name, value, 'a pattern is needed, as "2:4" or Pattern(2, 4)')


def as_plan(name: str, value: Any, masks: Any) -> PatternPlan:
    """The pattern of each of ``masks``, from one for all or a mapping from their names.

    Raises:
        ArgumentError: a pattern is none (``as_pattern``), or that of a mask is missing.
    """
    names = [*masks] if isinstance(masks, Mapping) else []
    if not isinstance(value, Mapping):
        return PatternPlan.uniform(names, as_pattern(name, value))
    if missing := [one for one in names if one not in value]:
        raise ArgumentError(name, value, f"a pattern for each mask is needed, also {missing[0]!r}")
    return PatternPlan({one: as_pattern(f"{name}[{one!r}]", value[one]) for one in names})


def checked_masks(name: str, masks: Any) -> Iterator[tuple[str, Tensor]]:
    """The items of a mapping from names of linears to masks in memory, bool or 0/1, (O, I). A mask
    is checked, and decoded if it comes from a file, when its turn comes.

    Raises:
        ArgumentError: naming the first entry that is something else.
    """
    if not isinstance(masks, Mapping):
        raise ArgumentError(name, masks, "a mapping from names of linears to masks is needed")
    if not masks:
        raise ArgumentError(name, masks, "at least one mask is needed")
    for key, mask in masks.items():
        if not isinstance(key, str) or key in ("", "__metadata__") or not _is_encodable(key):
            raise ArgumentError(f"{name}: a key", key, "the name of a linear is needed")
        where = f"{name}[{key!r}]"
        if not isinstance(mask, Tensor):
            raise ArgumentError(where, mask, "a torch.Tensor is needed, bool or 0/1")
        if mask.dim() != 2 or not mask.numel():
            shape = f"its shape is {tuple(mask.shape)}, and (out_features, in_features) is needed"
            raise ArgumentError(where, mask, shape)
        is_plain = mask.layout == torch.strided and mask.device.type != "meta"
        if not is_plain or mask.is_complex() or mask.is_quantized:
            kind = f"{mask.dtype}, {mask.layout}, on {mask.device}"
            raise ArgumentError(where, mask, f"bool or 0/1 in memory is needed, not {kind}")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ArgumentError(where, mask, "bool or 0/1 is needed, and it holds other numbers")
        yield key, mask


def _is_encodable(text: str, is_path: bool = False) -> bool:
    """Whether the text has no lone surrogates, which file headers cannot hold. A path may have
    those that stand for bytes which are no UTF-8.
    """
    try:
        text.encode("utf-8", "surrogateescape" if is_path else "strict")
    except UnicodeEncodeError:
        return False
    return True
