"""Requests to stop: signals, and the file that the verb stop writes.

A learning run finishes its step, saves and leaves. Any other verb stops where it is: what it writes
is written whole or not at all, so there is nothing to save.

Launchers and schedulers send SIGTERM or SIGUSR1, a terminal that closes SIGHUP, Ctrl-C SIGINT. A
second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
STOP_FILE = "STOP"  # in the folder of the learning run


class Interrupted(BaseException):
    """A signal stops the verb. No ``except Exception`` takes this for a failure of its own.

    Args:
        name: of the signal.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    @property
    def code(self) -> int:
        """The exit code that shells give to a process that the signal killed."""
        return 128 + signal.Signals[self.name].value


class StopRequest:
    """Set by a signal or a file, read between steps.

    Attributes:
        received: the name of the signal, or ``megamask stop``.
        is_final: whether the run is asked to stay down: a launcher must not start it again.
        is_raising: whether a signal raises ``Interrupted`` where it arrives, for work that does not
            read the request.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.is_final = False
        self.is_raising = False
        self._file: Path | None = None

    def watch(self, folder: Path) -> None:
        """Look for a file ``STOP`` in ``folder`` too. A file that is older than this process was
        meant for an earlier run, and goes; a file that came while the model was loaded stays, and
        so does a file that torchrun's processes before this one did not live to read: it is younger
        than torchrun, whose hosts count their restarts apart.
        """
        self._file = folder / STOP_FILE
        first = psutil.Process()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            first = first.parent() or first
        with suppress(OSError):
            if self._file.stat().st_mtime < first.create_time():
                self._file.unlink()

    def done(self) -> None:
        """Remove the file ``STOP``. Where it stays, the next start takes it for an old one."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()

    def raise_if_set(self) -> None:
        """Leave, at a place where nothing is to be saved.

        Raises:
            Interrupted: a signal came.
        """
        if self.received is not None:
            raise Interrupted(self.received)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            Interrupted: where signals are to raise.
            KeyboardInterrupt: at the second SIGINT.
        """
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.received == name:
            raise KeyboardInterrupt
        self.received = name
        if self.is_raising:
            raise Interrupted(name)

    def __bool__(self) -> bool:
        if not self.is_final and self._asks():
            self.received, self.is_final = "megamask stop", True
        return self.received is not None

    def _asks(self) -> bool:
        """Whether the file is there. A network file system may fail for a moment, which must not
        end a run: the next step looks again.
        """
        if self._file is None:
            return False
        try:
            self._file.stat()
        except OSError:
            return False
        return True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catch the signals inside the block and put the old handlers back afterwards. They are noted,
    and raised once the block sets ``is_raising``, where it can tell of them.

    A signal that was ignored before stays so: nohup asks for that. Outside the main thread, where
    Python catches no signals, nothing is caught.
    """
    request = StopRequest()
    is_main = threading.current_thread() is threading.main_thread()
    wanted = [one for one in SIGNALS if is_main and signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Let a signal raise at the end of the block at the earliest: the block stays whole."""
    handlers = (signal.getsignal(number) for number in SIGNALS)
    request = next((one for one in handlers if isinstance(one, StopRequest)), None)
    if request is None or not request.is_raising:
        yield
        return
    request.is_raising = False
    try:
        yield
    finally:
        request.is_raising = True
    request.raise_if_set()


def end_with(code: int) -> None:
    """Let a signal end a program that is done, with the exit code that it has earned."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))


def leave_to_main_thread() -> None:
    """Let the signals of this process pass by the calling thread, so that the main thread wakes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
