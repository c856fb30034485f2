"""The given settings and the text that decide what a run makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamask.config import Config
from megamask.data.shards import SPLITS, read_shards

# The settings that do not decide what is learned.
FREE = (
    "seed",
    "run_dir",
    "parallel",
    "device",
    "evaluate",
    "learn.snapshot",
    "learn.monitor",
    "learn.resume",
)


def given_settings(config: Config) -> dict[str, Any]:
    """The given settings that decide what is learned.

    Settings at their default are left out, so a new setting of megamask changes no hash.
    """
    given: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    for key in FREE:
        section, _, name = key.partition(".")
        (given.get(section, {}) if name else given).pop(name or section, None)
    return given


def text_digests(shards: Path) -> dict[str, list[str]]:
    """Domain -> digests of its training and held-out tokens, of the domains that are there: files
    may change under the names that the settings have.
    """
    return {
        folder.name: [read_shards(folder).content_sha256(split) for split in SPLITS]
        for folder in sorted(shards.iterdir() if shards.is_dir() else [])
        if (folder / "meta.json").exists()
    }
