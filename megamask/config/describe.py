"""The settings tree in words: every setting with its default, its range and its meaning, for
``megamask settings``, ``megamask VERB --help`` and docs/settings.md.
"""

from __future__ import annotations

import functools
import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megamask.config.section import Role, role_of
from megamask.config.tree import Config

WIDTH = 100
_BOUNDS = {"gt": "above", "ge": "from", "lt": "to below", "le": "to"}
_INTRODUCTION = """\
# Settings

Written by `python -m megamask settings --markdown > docs/settings.md` from the settings tree
(`megamask/config/tree.py` and `learn_tree.py`); a test compares the two.

A recipe (`--config FILE`) gives settings as YAML, and the command line as `key.sub=value`; the
command line wins. A mapping of names on the command line, such as `data.blend={code: 1}`, and an
entry of such a mapping, `data.domains.code={kind: stdlib}`, take the place of those of the recipe;
`data.blend.code=1` changes an entry, and a section, `learn.monitor={evaluate_every: 5}`, leaves the
settings that it does not name. On the command line `#` begins no comment. Below both lie the named
settings of `learn.preset`, `learn.memory` and `learn.method` (`megamask/config/presets.py`), and
below these the defaults. `null` is no value. A `~` or `~user` that begins a path is a home folder,
here and in the arguments of verbs.

A setting decides the content of what is made with it, so that a run whose setting changed is not
continued. Three kinds of settings are marked:

- *Free*: the setting decides nothing, and may change whenever a run is resumed.
- *Each step*: every learning step reads the setting anew, so a resumed run may change it from there
  on. The log warns, and snapshots, masks and reports record the change.
- *Content*: the setting is a path. What lies there decides, and the path may change.
"""


@dataclass(frozen=True)
class Leaf:
    """One setting.

    Attributes:
        key: dotted, as on the command line.
        default: as in a recipe.
        allowed: its values.
        meaning: its description.
        role: what a change of it means for what was made before.
    """

    key: str
    default: str
    allowed: str
    meaning: str
    role: Role


@dataclass(frozen=True)
class Group:
    """A section of the tree and its own settings; sections below it are groups of their own."""

    key: str
    about: str
    leaves: tuple[Leaf, ...]


def groups(prefixes: Sequence[str] = ()) -> list[Group]:
    """The sections of the tree in order, with the settings at or below ``prefixes`` (empty = all).

    A prefix that names nothing gives nothing.
    """
    found = []
    for group in _tree():
        own = tuple(leaf for leaf in group.leaves if not prefixes or _at(leaf.key, prefixes))
        if own:
            found.append(Group(group.key, group.about, own))
    return found


def leaves() -> list[Leaf]:
    """All settings, in the order of the groups."""
    return [leaf for group in groups() for leaf in group.leaves]


def range_of(key: str) -> str:
    """The values that a setting takes, in words; empty where there is no setting of that name.

    Args:
        key: dotted; below a mapping such as ``data.blend``, also the name of an entry.
    """
    found = (leaf.allowed.removeprefix("name: ") for leaf in leaves() if _at(key, [leaf.key]))
    return next(found, "")


def as_text(prefixes: Sequence[str] = ()) -> str:
    """For a terminal: key, default and range on a line, and the meaning below it."""
    lines: list[str] = []
    for group in groups(prefixes):
        title = f"{group.key}: {group.about}" if group.key else "top level"
        lines += ["", *textwrap.wrap(title, WIDTH)]
        for leaf in group.leaves:
            role = "" if leaf.role == "decides" else f" ({leaf.role})"
            lines += _wrap(f"{leaf.key} = {leaf.default}   {leaf.allowed}{role}", "  ")
            lines += _wrap(leaf.meaning, "      ") if leaf.meaning else []
    return "\n".join(lines[1:])


def as_markdown() -> str:
    """The text of docs/settings.md."""
    lines = [_INTRODUCTION]
    for group in groups():
        lines += [f"## {group.key or 'Top level'}", "", *textwrap.wrap(group.about, WIDTH), ""]
        for leaf in group.leaves:
            role = "" if leaf.role == "decides" else f" *{leaf.role.capitalize()}.*"
            text = f"`{leaf.key}` = `{leaf.default}` ({leaf.allowed}): {leaf.meaning}.{role}"
            lines += textwrap.wrap(
                text,
                WIDTH,
                initial_indent="- ",
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        lines.append("")
    return "\n".join(lines)


def in_recipe(value: Any) -> str:
    """A value as it is written in a recipe."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(in_recipe(one) for one in value)}]"
    if isinstance(value, str):
        return value if value.isidentifier() or ":" in value or "/" in value else json.dumps(value)
    return json.dumps(value)


@functools.cache
def _tree() -> tuple[Group, ...]:
    return tuple(_groups(Config, ""))


def _groups(section: type[BaseModel], prefix: str) -> Iterator[Group]:
    own, below = [], []
    for name, field in section.model_fields.items():
        annotation, key = field.annotation, f"{prefix}{name}"
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            below.append((annotation, f"{key}."))
            continue
        default = in_recipe(field.get_default(call_default_factory=True))
        allowed = _allowed(annotation, _bounds(field))
        own.append(Leaf(key, default, allowed, field.description or "", role_of(section, name)))
    about = " ".join((section.__doc__ or "").split()).replace("``", "`")
    yield Group(prefix.rstrip("."), about, tuple(own))
    for annotation, key in below:
        yield from _groups(annotation, key)


def _bounds(field: FieldInfo) -> list[str]:
    return [
        f"{word} {_number(getattr(one, name))}"
        for one in field.metadata
        for name, word in _BOUNDS.items()
        if hasattr(one, name)
    ]


def _number(bound: float) -> str:
    """A limit as it is written in words: 1,048,576 or 1e-09."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _allowed(annotation: Any, bounds: Sequence[str] = ()) -> str:
    """The values of a type, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        facts = [one for one in inner[1:] if isinstance(one, FieldInfo)]
        return _allowed(inner[0], [*bounds, *(bound for one in facts for bound in _bounds(one))])
    if origin is Literal:
        return " | ".join(in_recipe(one) for one in inner)
    if origin in (Union, types.UnionType):
        known = [_allowed(one, bounds) for one in inner if one is not type(None)]
        return " | ".join([*known, *(["null"] if type(None) in inner else [])])
    if origin is tuple:
        return f"[{', '.join(_allowed(one) for one in inner)}]"
    if origin is list:
        return f"list of {_allowed(inner[0])}"
    if origin is dict:
        is_section = isinstance(inner[1], type) and issubclass(inner[1], BaseModel)
        return f"name: {'mapping' if is_section else _allowed(inner[1])}"
    names = {bool: "true | false", int: "whole number", float: "number", str: "text"}
    return " ".join([names[annotation], *bounds])


def _at(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False
    )
