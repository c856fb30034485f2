"""A thread that ends a process which makes no progress, and first writes down where it stands.

Ranks that wait for each other wait in silence, in code that answers no signal. The thread writes
the stacks of all threads into a file of the run, so that the rank that everybody waits for can be
found: the others stand in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamask.errors import EXIT_UNAVAILABLE
from megamask.process.holder import Holder, utc_now
from megamask.process.place import Place
from megamask.process.signals import leave_to_main_thread

# Seconds between the stacks and the end: the other ranks, whose connections break at the end of
# this one, write their stacks first.
GRACE = 10.0


class Watchdog:
    """The thread, and what it waits for.

    Args:
        folder: of the files ``stacks-rank-N.txt``.
        place: of this process.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self._file = folder / f"stacks-rank-{place.rank}.txt"
        self._place = place
        self._changed = threading.Condition()
        self._what, self._deadline = "", float("inf")
        self._limit, self._is_closed = 0.0, False

    def expect(self, what: str, seconds: float) -> None:
        """Start the time anew: ``what`` must have happened in ``seconds``, or the process ends."""
        with self._changed:
            self._what, self._limit = what, seconds
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run the thread inside the block."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify()
            thread.join()

    def _watch(self) -> None:
        leave_to_main_thread()
        with self._changed:
            while not self._is_closed:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            else:
                return
        self._end_process()

    def _end_process(self) -> None:
        who = f"{Holder.this_process('megamask')}, rank {self._place.rank}"
        said = f"no {self._what} within {self._limit / 60:g} minutes"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as stream:
                print(f"{utc_now()}  {who}: {said}", file=stream, flush=True)
                faulthandler.dump_traceback(stream, all_threads=True)
            where = f"the stacks of its threads are in {self._file}"
        except OSError as error:
            where = f"its stacks cannot be written ({error.strerror})"
        print(
            f"megamask: error{self._place.label}: {said}; {where}. Another rank may have died or "
            "hang; start again to go on from the last snapshot.",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(GRACE)
        os._exit(EXIT_UNAVAILABLE)
