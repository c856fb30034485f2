"""The settings that decide what an artefact contains. An artefact that was made under other
deciding settings is not continued and not reused.

Each artefact names the sections or settings that it is made from (a tuple below); of these, the
settings that the tree declares free (``section.free``) decide nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel

from megamask.config.nested import flatten
from megamask.config.section import is_free
from megamask.config.tree import Config

GGUF = ("model.gguf",)
CONVERT = ("model.hf",)
TOKENIZE = ("data.tokenizer", "data.domains", "data.eod", "data.bos")
PRUNE = (
    "dtype",
    "pattern",
    "model.include",
    "model.exclude",
    "data.blend",
    "data.seq_length",
    "calibration",
    "prune",
)
LEARN = (
    "seed",
    "dtype",
    "pattern",
    "model",
    "data.tokenizer",
    "data.blend",
    "data.seq_length",
    "data.eod",
    "data.bos",
    "learn",
)
EXPORT = ("export",)
EVALUATE = ("dtype", "evaluate")


def deciding_settings(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value of the deciding settings among ``sections``. A path below the run
    folder is kept relative to it, so that the folder can be moved.
    """
    flat = flatten(config.model_dump(mode="json"))
    return {
        key: _relative(value, config.run_dir)
        for key, value in flat.items()
        if _is_below(key, sections) and not _is_below(key, free_settings())
    }


def changes(
    before: Mapping[str, Any],
    now: Config,
    sections: Sequence[str],
    ignored: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value now) of the deciding settings that differ, sorted.

    Args:
        before: ``deciding_settings`` of the same sections, in the words of today; settings that it
            does not name had their defaults.
        now: the settings of today.
        sections: of the artefact.
        ignored: settings that have no effect on it, whatever their value is.
    """
    here = deciding_settings(now, sections)
    there = {
        key: _relative(value, now.run_dir)
        for key, value in (deciding_settings(Config(), sections) | dict(before)).items()
        if _is_below(key, sections) and not _is_below(key, free_settings())
    }
    return {
        key: (there.get(key), here.get(key))
        for key in sorted(here.keys() | there.keys())
        if key not in ignored and here.get(key) != there.get(key)
    }


@cache
def free_settings() -> tuple[str, ...]:
    """Dotted keys of the settings that decide no artefact's content."""
    return tuple(_free(Config, ""))


def _free(section: type[BaseModel], prefix: str) -> list[str]:
    found: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _free(field.annotation, f"{prefix}{name}.")
        elif is_free(section, name):
            found.append(f"{prefix}{name}")
    return found


def _is_below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _relative(value: Any, run_dir: str) -> Any:
    return value.replace(run_dir, "{run_dir}") if isinstance(value, str) and run_dir else value
