"""The errors a user can cause, each with the key, the value, what is allowed and the fix."""

from __future__ import annotations

from typing import Any

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: a snapshot was saved, start again to go on


class MegamaskError(Exception):
    """Base of every error that the command line prints as one message, without a traceback."""


class ConfigError(MegamaskError):
    """A setting that cannot work.

    Args:
        key: the setting, dotted as on the command line (``learn.steps``).
        value: what was given.
        allowed: what would be accepted.
        fix: what to do now.
    """

    def __init__(self, key: str, value: Any, allowed: str, fix: str) -> None:
        self.key, self.value, self.allowed, self.fix = key, value, allowed, fix
        super().__init__(f"{key} = {value!r}: {allowed}. {fix}")


class ArtifactError(MegamaskError):
    """A file or folder that is missing, torn, or does not fit the other inputs.

    Args:
        path: the file or folder.
        problem: what is wrong with it.
        fix: what to do now.
    """

    def __init__(self, path: Any, problem: str, fix: str) -> None:
        self.path, self.problem, self.fix = str(path), problem, fix
        super().__init__(f"{path}: {problem}. {fix}")


class LearningError(MegamaskError):
    """Learning cannot go on (a loss that is not finite, for example); what was saved stays."""
