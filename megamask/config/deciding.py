"""The settings that decide what an artefact contains. An artefact that was made under other
deciding settings is not continued and not reused.

Each artefact names the sections or settings that it is made from (a tuple below). The tree says for
each setting what a change of it means (``section.Role``):

- ``free``: nothing.
- ``each step``: a learning run goes on with the new value, and records the change.
- ``content``: a path. What lies there decides, by a digest that the artefact keeps.
- ``decides``: the artefact is another one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from megamask.config.describe import leaves
from megamask.config.nested import flatten
from megamask.config.section import Role
from megamask.config.tree import Config
from megamask.user_paths import with_home

RUN = "{run_dir}"  # stands for the run folder in paths below it
GGUF = ("model.gguf",)
CONVERT = ("model.hf", "model.megatron")
TOKENIZE = ("data.tokenizer", "data.domains", "data.eod", "data.bos")
PRUNE = (
    "dtype",
    "pattern",
    "pattern_overrides",
    "model.include",
    "model.exclude",
    "model.exclude_sensitive",
    "data.blend",
    "data.seq_length",
    "calibration",
    "prune",
)
LEARN = (
    "seed",
    "dtype",
    "pattern",
    "pattern_overrides",
    "model",
    "data.tokenizer",
    "data.blend",
    "data.seq_length",
    "data.eod",
    "data.bos",
    "learn",
)
# Settings whose default is not what was done before there was the setting. Where a note does not
# name one, the artefact itself tells: the shards say whether their documents begin with a BOS.
TOLD_BY_ARTEFACTS = ("data.bos",)
EXPORT = ("export",)
EVALUATE = ("dtype", "evaluate")


def deciding_settings(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value of the deciding settings among ``sections``. A path below the run
    folder is kept relative to it, so that the folder can be moved.
    """
    flat = flatten(config.model_dump(mode="json"))
    return {
        key: below_run(value, config.run_dir)
        for key, value in flat.items()
        if _is_below(key, sections) and not _is_below(key, free_settings())
    }


def changes(
    before: Mapping[str, Any],
    now: Config,
    sections: Sequence[str],
    ignored: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value now) of the deciding settings that differ, sorted. Two
    spellings of one path do not differ.

    Args:
        before: ``deciding_settings`` of the same sections, in the words of today; settings that it
            does not name had their defaults.
        now: the settings of today.
        sections: of the artefact.
        ignored: settings that have no effect on it, whatever their value is.
    """
    here = deciding_settings(now, sections)
    there = {
        key: value
        for key, value in (deciding_settings(Config(), sections) | dict(before)).items()
        if _is_below(key, sections) and not _is_below(key, free_settings())
    }
    return {
        key: (there.get(key), here.get(key))
        for key in sorted(here.keys() | there.keys())
        if key not in ignored
        and (key in before or key not in TOLD_BY_ARTEFACTS)
        and _spelled(here.get(key), now.run_dir) != _spelled(there.get(key), now.run_dir)
    }


@cache
def free_settings() -> tuple[str, ...]:
    """Dotted keys of the settings that decide no artefact's content."""
    return settings_of_role("free")


@cache
def settings_of_role(role: Role) -> tuple[str, ...]:
    """Dotted keys of the settings with ``role``."""
    return tuple(leaf.key for leaf in leaves() if leaf.role == role)


def _is_below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def below_run(value: Any, run_dir: str) -> Any:
    """A path below the run folder relative to it; every other value as it is."""
    spelled = _spelled(value, run_dir)
    return spelled if isinstance(spelled, str) and spelled.startswith(RUN) else value


def _spelled(value: Any, run_dir: str) -> Any:
    """One spelling for all spellings of a path: absolute, without links and ``..``, or relative to
    the run folder. A text without a slash is no path, but the name of a mask, for example. A note
    of an older version may have a ``~``.
    """
    if not isinstance(value, str) or "/" not in value or "\0" in value:
        return value
    root = os.path.realpath(run_dir)
    inside = value == RUN or value.startswith(f"{RUN}/")
    text = root + value[len(RUN) :] if inside else with_home(value) or value
    whole = os.path.realpath(text)
    return RUN + whole[len(root) :] if whole == root or whole.startswith(f"{root}/") else whole
