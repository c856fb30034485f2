"""What goes to the terminal and to logs: text without control characters of strangers, lengths of
time, and how often long work is told.
"""

from __future__ import annotations

import logging

from megamask.errors import printable

PROGRESS_LINES = 10  # about so many lines report the progress of long work


def tell(text: str) -> None:
    """Print ``text`` to stdout, with the control characters in it written out."""
    print(printable(text))


def is_reported(number: int, total: int) -> bool:
    """Whether the log tells that part ``number`` of ``total``, counted from 1, is done: a tenth of
    the parts, and the last.
    """
    return number % -(-total // PROGRESS_LINES) == 0 or number == total


def duration(seconds: float) -> str:
    """``42s``, ``3m07s``, ``2h05m``, ``3d04h``."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class PlainFormatter(logging.Formatter):
    """A formatter of log lines that writes control characters out."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(super().format(record))
