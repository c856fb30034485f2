"""A verb's own argument, as a field of a dataclass."""

from __future__ import annotations

from dataclasses import MISSING, Field, field
from typing import Any


def argument(
    words: str,
    help: str,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    kind: type[Any] = str,
    many: bool = False,
) -> Any:
    """A field of an arguments dataclass.

    Args:
        words: ``--flag VALUE``, or the name of a positional argument in capitals, with ``...``
            behind it where it may come several times.
        help: what it is.
        default: its value where it is not given; without one it is required.
        choices: the values that are allowed; empty = all.
        kind: ``str``, ``int`` for a number above 0, or ``bool`` for a flag without a value.
        many: whether the value is a tuple of all that was given; only for the last positional
            argument.
    """
    facts = {"words": words, "help": help, "choices": choices, "kind": kind, "many": many}
    return field(default=default, metadata=facts)


def words_of(one: Field[Any]) -> str:
    """How an argument is written: ``--json FILE``, or ``SNAPSHOT``."""
    return str(one.metadata["words"])
