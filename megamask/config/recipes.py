"""The recipes that come with the program, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from megamask.errors import ConfigError
from megamask.shipped import shipped


def recipes() -> dict[str, Path]:
    """Name -> file."""
    return {path.stem: path for path in sorted(shipped("configs/recipes").glob("*.yaml"))}


def summary(path: Path) -> str:
    """The first line of a recipe, which is a comment."""
    with path.open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()


def find_recipe(given: Path) -> Path:
    """The file that ``--config`` means: a file, or else the recipe of that name.

    Raises:
        ConfigError: there is neither.
    """
    is_file = given.exists() and not given.is_dir()
    if is_file or len(given.parts) != 1 or given.suffix:
        return given  # a file that is missing is refused where it is read
    return recipe_named(given.name, "--config")


def recipe_named(name: str, key: str) -> Path:
    """The file of the recipe ``name``.

    Args:
        name: as ``recipes()`` has it.
        key: the argument that gave the name, for the message.

    Raises:
        ConfigError: there is no such recipe.
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Run megamask recipes for a list."
        a_file = "a file, or " if key == "--config" else ""
        raise ConfigError(key, name, f"{a_file}one of {', '.join(known)}", fix)
    return known[name]
