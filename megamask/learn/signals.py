"""Requests to save and leave: signals, and the file that the verb stop writes. The step that a
request interrupts is finished first.

Launchers and schedulers send SIGTERM or SIGUSR1, a terminal that closes SIGHUP, Ctrl-C SIGINT. A
second Ctrl-C leaves at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


STOP_FILE = "STOP"  # in the folder of the learning run


class StopRequest:
    """Set by a signal or a file, read between steps.

    Attributes:
        received: the name of the signal, or ``megamask stop``.
        is_final: whether the run is asked to stay down: a launcher must not start it again.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.is_final = False
        self._file: Path | None = None

    def watch(self, folder: Path) -> None:
        """Look for a file ``STOP`` in ``folder`` too; one that is there already was not meant for
        this run, and goes.
        """
        self._file = folder / STOP_FILE
        self._file.unlink(missing_ok=True)

    def done(self) -> None:
        """Remove the file ``STOP``."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            KeyboardInterrupt: at the second SIGINT.
        """
        if number == signal.SIGINT and self.received == signal.Signals(number).name:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __bool__(self) -> bool:
        if not self.is_final and self._file is not None and self._file.exists():
            self.received, self.is_final = "megamask stop", True
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
