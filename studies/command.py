"""What the command lines of all studies share: settings among the words, what globs
name, the check of the prepared run, and how errors end a study.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from megamask.config import Config
from megamask.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, MegamaskError
from studies.child import ArmError

EXIT_SOME_FAILED = 1
Named = TypeVar("Named")


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(settings, options): every word ``key=value`` is a setting, wherever it stands."""
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    return settings, [word for word in words if word not in settings]


def select(
    known: Mapping[str, Named], patterns: Sequence[str] | None, option: str, noun: str
) -> list[Named]:
    """What the shell-style patterns of an option name, in the order of the patterns; None: all.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    chosen: dict[str, Named] = {}
    for pattern in patterns or ["*"]:
        matches = fnmatch.filter(known, pattern)
        if not matches:
            allowed = f"one of {', '.join(known)}"
            raise ConfigError(option, pattern, allowed, f"Name {noun}, or use * and ?.")
        chosen |= {name: known[name] for name in matches if name not in chosen}
    return list(chosen.values())


def check_base(base: Path, folders: Sequence[str]) -> None:
    """Check that a prepared run has what a study reads of it, before anything is made.

    Raises:
        ConfigError: a folder is missing.
    """
    for name in folders:
        if not (base / name).is_dir():
            allowed = f"a run folder with {', '.join(f'{one}/' for one in folders)}"
            fix = "Run ./launch/quickstart.sh, or the verbs gguf, convert and tokenize, first."
            raise ConfigError("--base", str(base), f"{allowed}; {name}/ is missing", fix)


def check_heldout(config: Config) -> None:
    """Check that a study evaluates held-out text: its tables have a column for each domain.

    Raises:
        ConfigError: another protocol is set.
    """
    protocol = config.evaluate.protocol
    if config.evaluate.is_published:
        fix = "Leave it out here, and run megamask evaluate on the masks of a run folder."
        raise ConfigError("evaluate.protocol", protocol, "heldout in a study", fix)


def ended(name: str, work: Callable[[], int]) -> int:
    """The exit code of ``work``; an error that a user can cause is one line, and Ctrl-C leaves what
    is done.
    """
    try:
        return work()
    except (MegamaskError, ArmError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
