"""The errors that a user can cause. Each message names the cause, what is allowed and the fix."""

from __future__ import annotations

from pathlib import Path

MAX_SHOWN = 300  # characters of a value in a message

EXIT_OK = 0
EXIT_BUG = 1  # an error that nobody foresaw, with its traceback
EXIT_USER_ERROR = 2
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE: a rank or a file system gave no answer; it may next time
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: a snapshot was saved, and the same command goes on from it


class MegamaskError(Exception):
    """Base class of the errors that the command line prints as one message without a traceback.

    Attributes:
        code: the exit code.
    """

    code = EXIT_USER_ERROR


class ConfigError(MegamaskError):
    """A setting that cannot work.

    Args:
        key: the setting, dotted as on the command line (``learn.steps``).
        value: the given value.
        allowed: the values that are accepted.
        fix: the next action of the user.
    """

    def __init__(self, key: str, value: object, allowed: str, fix: str) -> None:
        self.key, self.value, self.allowed, self.fix = key, value, allowed, fix
        super().__init__(f"{printable(key)} = {shown(value)}: {allowed}. {fix}")


class ArtifactError(MegamaskError):
    """A file or folder that is missing, torn, or does not fit the other inputs.

    Args:
        path: the file or folder.
        problem: a predicate for the path, as "is missing".
        fix: the next action of the user.
    """

    def __init__(self, path: Path | str, problem: str, fix: str) -> None:
        self.path, self.problem, self.fix = str(path), problem, fix
        super().__init__(f"{printable(str(path), kept='')}: {problem}. {fix}")


class WriterError(ArtifactError):
    """A process that writes an output was killed or failed; the same command may work again."""

    code = EXIT_UNAVAILABLE


class ArgumentError(MegamaskError, TypeError, ValueError):
    """An argument of a public function that cannot work.

    The error is also a TypeError and a ValueError, so that code which catches Python's own classes
    for a bad argument catches it.

    Args:
        name: the function and its argument, as ``save_masks: pattern``.
        value: the given value.
        allowed: the values that are accepted.
        fix: the next action of the user, if there is more to say.
    """

    def __init__(self, name: str, value: object, allowed: str, fix: str = "") -> None:
        self.name, self.value, self.allowed, self.fix = name, value, allowed, fix
        super().__init__(f"{name} is {described(value)}: {allowed}. {fix}".rstrip())


class LearningError(MegamaskError):
    """Learning cannot go on, for example after a loss that is not finite. Saved snapshots stay."""


def shown(value: object) -> str:
    """A value as a message shows it: cut where it is long, whatever it holds."""
    try:
        text = repr(value)
    except Exception:  # a number of more digits than Python writes, a value that holds itself
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def described(value: object) -> str:
    """A value as the message about an argument shows it: a short literal, or else its type."""
    if value is None or isinstance(value, bool | str | bytes | int | float | Path):
        return printable(shown(value))
    return f"an object of type {type(value).__name__}"


class LaunchError(MegamaskError):
    """Another rank did not come, ended, or does not answer; the same command may work again."""

    code = EXIT_UNAVAILABLE


class OtherRankError(MegamaskError):
    """The error of another rank, as rank 0 tells it.

    Args:
        rank, host: where it happened.
        message: of the error.
        code: the exit code.
    """

    def __init__(self, rank: int, host: str, message: str, code: int) -> None:
        self.code = code
        super().__init__(f"rank {rank} on {host}: {message}")


class DismissedError(MegamaskError):
    """All ranks leave, and rank 0 says why: this rank has nothing to say.

    Args:
        message: for the traceback of a program.
        code: the exit code, that of the error on rank 0: a launcher may see only one of them.
    """

    def __init__(self, message: str, code: int = EXIT_USER_ERROR) -> None:
        self.code = code
        super().__init__(message)


def printable(text: str, kept: str = "\n\t") -> str:
    """``text`` with control characters written out: a file's contents must not steer a terminal.

    Args:
        text: from a file, a path or a setting.
        kept: the control characters that stay.
    """
    return "".join(
        letter if letter.isprintable() or letter in kept else ascii(letter)[1:-1] for letter in text
    )
