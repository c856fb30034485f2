"""Paths as users write them: the one place where ``~`` and ``~user`` become home folders.

Bash expands ``~`` at the beginning of a word alone, and neither in ``export.out=~/exported`` nor in
a recipe. So the settings (``UserPath`` in ``config/section.py``), the arguments of verbs and those
of public functions come here, once, where they are read. Every path behind is taken as it is.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megamask.errors import ConfigError

ALLOWED = "a path in which ~ stands for a home folder that is known here"
FIX = "Write the home folder itself, or ./ before a name that begins with ~."


def with_home(text: str) -> str | None:
    """The path with the home folder in the place of ``~`` or ``~user``; None where the user has no
    home folder here, as in a container whose user has no name. Other texts are as they were.
    """
    found = os.path.expanduser(text)  # Path.expanduser also takes ./~ for a home folder
    return None if found.startswith("~") else found


def user_path(key: str, text: str) -> str:
    """As ``with_home``.

    Args:
        key: the setting or argument, for the message.
        text: its value.

    Raises:
        ConfigError: the user has no home folder here.
    """
    found = with_home(text)
    if found is None:
        raise ConfigError(key, text, ALLOWED, FIX)
    return found


def path_argument(text: str) -> Path:
    """As ``with_home``, as the ``type`` of an option of argparse, which names the option.

    Raises:
        argparse.ArgumentTypeError: the user has no home folder here.
    """
    found = with_home(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {ALLOWED}. {FIX}")
    return Path(found)
