"""What goes to the terminal and to logs: text without control characters of strangers."""

from __future__ import annotations

import logging

from megamask.errors import printable


def tell(text: str) -> None:
    """Print ``text`` to stdout, with the control characters in it written out."""
    print(printable(text))


class PlainFormatter(logging.Formatter):
    """A formatter of log lines that writes control characters out."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(super().format(record))
