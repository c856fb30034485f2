"""defaults < preset < YAML recipe < dotted overrides, with errors that name the key, the value and
the fix.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megamask import user_paths
from megamask.config import describe, legacy
from megamask.config.nested import Whole, merge, nest
from megamask.config.presets import named_settings, plain
from megamask.config.recipes import find_recipe
from megamask.config.section import UNKNOWN_USER
from megamask.config.tree import Config
from megamask.config.yaml_text import read_value, read_yaml
from megamask.errors import ArgumentError, ConfigError

# The kinds of error that pydantic reports for a number without its range.
_OUT_OF_RANGE = {
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"),
    *("int_parsing", "int_parsing_size", "int_from_float", "int_type", "float_parsing"),
    "float_type",
}


def load_config(recipe: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``key.sub=value`` overrides.

    Args:
        recipe: a file, as text or a path, or the name of a recipe that comes with the program, such
            as ``quickstart``.
        overrides: words ``key.sub=value``.

    Raises:
        ConfigError: unknown key (with the nearest name), value out of range, unreadable recipe.
    """
    return read_settings(recipe, overrides)[0]


def read_settings(
    recipe: Path | str | None, overrides: Sequence[str]
) -> tuple[Config, dict[str, dict[str, Any]]]:
    """As ``load_config``, and the arguments of verbs that were given as settings, as they were
    before: verb -> argument -> value.

    Raises:
        ConfigError: as ``load_config``.
    """
    if not isinstance(recipe, str | Path | None) or recipe == "":
        raise ArgumentError("load_config: recipe", recipe, "a path is needed, or None")
    words = overrides if isinstance(overrides, list | tuple) else [None]
    if not all(isinstance(one, str) for one in words):
        allowed = 'a list of words is needed, as ["learn.steps=100"]'
        raise ArgumentError("load_config: overrides", overrides, allowed)
    file = user_paths.user_path("--config", recipe) if isinstance(recipe, str) else recipe
    from_recipe: dict[str, Any] = _read_recipe(Path(file)) if file is not None else {}
    from_overrides: dict[str, Any] = {}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(
                override,
                override,
                "an override has the form key.sub=value",
                "Write it as, for example, learn.steps=100.",
            )
        value = _parse_value(key, text)
        if isinstance(value, dict) and _is_replaced(key.strip().split(".")):
            value = Whole(value)  # data.blend={code: 1}: these entries, and not those of the recipe
        merge(from_overrides, nest({key.strip(): value}))
    layers = [from_recipe, from_overrides]
    arguments: dict[str, dict[str, Any]] = {}
    for layer in layers:
        merge(arguments, legacy.take_arguments(layer))
    return _checked(_upgrade(layers)), arguments


def _upgrade(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layers merged, with their old words replaced."""
    silent: dict[str, Any] = {}
    for layer in layers:
        merge(silent, legacy.upgrade(copy.deepcopy(layer), silent, say=False))
    whole = named_settings(silent)
    given: dict[str, Any] = {}
    for layer in layers:
        new = legacy.upgrade(layer, whole)
        merge(whole, new)
        merge(given, new)
    return given


def build_config(values: Mapping[str, Any]) -> Config:
    """Check ``values`` against the tree, over the named settings that they ask for.

    Raises:
        ArgumentError: ``values`` is no mapping.
        ConfigError: the first thing that is wrong.
    """
    if not isinstance(values, Mapping):
        allowed = 'a mapping is needed, as {"learn": {"steps": 100}}'
        raise ArgumentError("build_config: values", values, allowed)
    return _checked(_upgrade([copy.deepcopy(plain(values))]))


def _checked(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(
            str(part) for part in first["loc"] if not isinstance(part, int)
        )  # of a pair, the setting
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                key, first["input"], "no such setting", _suggest(first["loc"])
            ) from None
        if first["type"] == UNKNOWN_USER:
            raise ConfigError(key, first["input"], user_paths.ALLOWED, user_paths.FIX) from None
        if first["type"] == "missing":
            choices = get_args(_annotation([str(part) for part in first["loc"]]))
            allowed = f"one of {', '.join(map(str, choices))}" if choices else "a value is needed"
            fix = "Give it in the recipe or on the command line."
            raise ConfigError(key, None, allowed, fix) from None
        allowed = describe.range_of(key) if first["type"] in _OUT_OF_RANGE else ""
        fix = "Correct it in the recipe or on the command line."
        raise ConfigError(key, first["input"], allowed or first["msg"], fix) from None


def _read_recipe(recipe: Path) -> dict[str, Any]:
    recipe = find_recipe(recipe)
    try:
        loaded = read_yaml(recipe.read_bytes())
    except OSError as error:
        allowed = f"a readable YAML file ({error.strerror})"
        raise ConfigError("--config", str(recipe), allowed, "Check the path.") from None
    except ValueError as error:
        allowed = f"a YAML file in UTF-8 ({error})"
        raise ConfigError("--config", str(recipe), allowed, "Correct the file.") from None
    if not isinstance(loaded or {}, dict):
        raise ConfigError(
            "--config", str(recipe), "a mapping at the top level", "Write key: value lines."
        )
    return loaded or {}


def _parse_value(key: str, text: str) -> Any:
    try:
        return read_value(text)
    except ValueError:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise ConfigError(key, shown, "a YAML value", "Quote it.") from None


def _is_replaced(parts: Sequence[str]) -> bool:
    """Whether a mapping on the command line takes the place of the recipe's: a setting of names, or
    the entry of a name. Sections are merged.
    """
    return any(get_origin(_annotation(some)) is dict for some in (parts, parts[:-1]))


def _suggest(location: tuple[int | str, ...]) -> str:
    """Name the nearest setting: beside the unknown key, or else anywhere in the tree."""
    parts = [str(part) for part in location]
    if len(parts) == 1 and any(leaf.key == parts[0] for leaf in describe.leaves()):
        *sections, name = parts[0].split(".")
        return f"A recipe is nested: write {name} below {': '.join(sections)}:."
    section = _annotation(parts[:-1])
    names = list(section.model_fields) if _is_section(section) else []
    prefix = ".".join(parts[:-1])
    near = difflib.get_close_matches(parts[-1], names, n=1)
    if near:
        return f"Did you mean {'.'.join(filter(None, [prefix, near[0]]))}?"
    by_leaf: dict[str, list[str]] = {}
    for leaf in describe.leaves():
        by_leaf.setdefault(leaf.key.rsplit(".", 1)[-1], []).append(leaf.key)
    near = difflib.get_close_matches(parts[-1], list(by_leaf), n=1)
    if near:
        return f"Did you mean {' or '.join(by_leaf[near[0]])}?"
    return f"{prefix or 'The top level'} has: {', '.join(names)}."


def _annotation(parts: Sequence[str]) -> Any:
    """The type of the setting or section at dotted ``parts``, an entry of a mapping included; None
    where there is none.
    """
    found: Any = Config
    for part in parts:
        if _is_section(found):
            field = found.model_fields.get(part)
            found = field.annotation if field else None
        else:
            found = get_args(found)[1] if get_origin(found) is dict else None
    return found


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
