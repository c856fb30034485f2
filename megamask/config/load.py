"""defaults < preset < YAML recipe < dotted overrides, with errors that name the key, the value and
the fix.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megamask.config.presets import FOOTPRINTS, LEARNERS, PRESETS
from megamask.config.tree import Config
from megamask.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``2:4`` and ``off`` are text (YAML 1.1 reads 124 and False), ``1e-3`` is a
    number (YAML 1.1 reads text).
    """


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in ("int", "float", "bool")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def load_config(recipe: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``key.sub=value`` overrides.

    Raises:
        ConfigError: unknown key (with the nearest name), value out of range, unreadable recipe.
    """
    given: dict[str, Any] = _read_recipe(recipe) if recipe is not None else {}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(
                override,
                override,
                "an override has the form key.sub=value",
                "Write it as, for example, learn.steps=100.",
            )
        _merge(given, _nest(key.strip().split("."), _parse_scalar(key, text)))
    layered: dict[str, Any] = {}
    learn = given.get("learn")
    for key, named in (("learner", LEARNERS), ("preset", PRESETS), ("footprint", FOOTPRINTS)):
        name = learn.get(key) if isinstance(learn, dict) else None
        _merge(layered, named.get(name, {}) if isinstance(name, str) else {})
    _merge(layered, given)
    return build_config(layered)


def build_config(values: dict[str, Any]) -> Config:
    """Check ``values`` against the tree.

    Raises:
        ConfigError: the first thing that is wrong.
    """
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
        raise ConfigError(
            key, first["input"], first["msg"], "Correct it in the recipe or on the command line."
        ) from None


def _read_recipe(recipe: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(recipe.read_text(), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(
            "--config", str(recipe), f"a readable YAML file ({error.strerror})", "Check the path."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            "--config", str(recipe), f"a YAML file ({error})", "Correct the file."
        ) from None
    if not isinstance(loaded or {}, dict):
        raise ConfigError(
            "--config", str(recipe), "a mapping at the top level", "Write key: value lines."
        )
    return loaded or {}


def _parse_scalar(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise ConfigError(key, text, "a YAML value", "Quote it.") from None


def _nest(path: list[str], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        elif isinstance(value, dict):
            below[key] = {}
            _merge(below[key], value)
        else:
            below[key] = value


def _suggest(location: tuple[int | str, ...]) -> str:
    """Name the nearest setting: beside the unknown key, or else anywhere in the tree."""
    parts = [str(part) for part in location]
    section: Any = Config
    for part in parts[:-1]:
        field = (
            section.model_fields.get(part)
            if isinstance(section, type) and issubclass(section, BaseModel)
            else None
        )
        section = field.annotation if field else None
    names = (
        list(section.model_fields)
        if isinstance(section, type) and issubclass(section, BaseModel)
        else []
    )
    prefix = ".".join(parts[:-1])
    near = difflib.get_close_matches(parts[-1], names, n=1)
    if near:
        return f"Did you mean {'.'.join(filter(None, [prefix, near[0]]))}?"
    everywhere = dict.fromkeys(leaf_keys(Config))
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in everywhere}
    near = difflib.get_close_matches(parts[-1], list(by_leaf), n=1)
    if near:
        return f"Did you mean {by_leaf[near[0]]}?"
    return f"{prefix or 'The top level'} has: {', '.join(names)}."


def leaf_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a section, in order."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += leaf_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
