"""The verb settings: every setting with its default, its range and its meaning."""

from __future__ import annotations

import difflib

from megamask.config import Config, describe
from megamask.errors import ConfigError
from megamask.terminal import tell
from megamask.verbs.own_arguments import SettingsArguments


def run(config: Config, arguments: SettingsArguments) -> None:
    """Print the settings tree, or the part of it at ``arguments.prefix``.

    Raises:
        ConfigError: there is no such section or setting.
    """
    if arguments.markdown:
        tell(describe.as_markdown().removesuffix("\n"))
        return
    prefix = arguments.prefix
    text = describe.as_text([prefix] if prefix else [])
    if not text:
        settings = (leaf.key for leaf in describe.leaves())
        names = [*(group.key for group in describe.groups()), *settings]
        near = difflib.get_close_matches(str(prefix), names, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Run megamask settings."
        raise ConfigError("PREFIX", prefix, "a section or a setting", fix)
    tell(text)
