"""A verb's own argument, as a field of a dataclass."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from megamask.user_paths import user_path


def argument(
    words: str,
    help: str,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    kind: type[Any] = str,
    many: bool = False,
    is_path: bool = False,
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
        is_path: whether the value is a path, or may be one.
    """
    facts = {"words": words, "help": help, "choices": choices, "kind": kind}
    return field(default=default, metadata={**facts, "many": many, "is_path": is_path})


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Base of the arguments of a verb.

    Raises:
        ConfigError: a path whose ``~user`` has no home folder here.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.metadata["is_path"]:
                value, flag = getattr(self, one.name), words_of(one).split()[0]
                given = value if isinstance(value, tuple) else (value,)
                found = tuple(user_path(flag, each) if each else each for each in given)
                whole = found if isinstance(value, tuple) else found[0]
                object.__setattr__(self, one.name, whole)  # of a frozen object


def words_of(one: Field[Any]) -> str:
    """How an argument is written: ``--json FILE``, or ``SNAPSHOT``."""
    return str(one.metadata["words"])
