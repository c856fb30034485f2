"""The given settings that decide what a run makes."""

from __future__ import annotations

from typing import Any

from megamask.config import Config

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
