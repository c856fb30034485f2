"""Signals that ask a run to save and leave. The step that a signal interrupts is finished first.

Launchers and schedulers send SIGTERM or SIGUSR1, a terminal that closes SIGHUP, Ctrl-C SIGINT. A
second Ctrl-C leaves at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Set by a signal, read between steps."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            KeyboardInterrupt: at the second SIGINT.
        """
        if number == signal.SIGINT and self.received == signal.Signals(number).name:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.received is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catch the signals inside the block and put the old handlers back afterwards."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
