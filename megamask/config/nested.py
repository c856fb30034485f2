"""Nested mappings and their dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> values. An empty mapping has none."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mappings of dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def what_differs(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The dotted keys that two nested mappings do not share with one value, as a list in words;
    empty where the mappings are equal.
    """
    return ", ".join(_differing(before, now))


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differing(old, new, f"{prefix}{key}.")
        elif old != new or (key in before) != (key in now):
            found.append(f"{prefix}{key}")
    return found


class Whole(dict[str, Any]):
    """A mapping that takes the place of the one below it, where others are merged."""


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Put the values of ``above`` into ``below``, section by section."""
    for key, value in above.items():
        if isinstance(value, Whole):
            below[key] = Whole(value)
        elif isinstance(value, dict):
            if not isinstance(below.get(key), dict):
                below[key] = {}
            merge(below[key], value)
        else:
            below[key] = value
