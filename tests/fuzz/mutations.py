"""Mutations of files, and a loop that reads each mutated file: within five seconds, in little
memory, with no exception but ours.
"""

from __future__ import annotations

import copy
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamask.errors import MegamaskError
from tests.conftest import IS_NIGHTLY

MUTATIONS = 3000
PATIENCE = 5.0  # seconds for a file of a few KiB, on a busy machine
SPARE_MIB = 64.0  # imports and caches of readers; a length that is believed takes GiB
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("inf"),
    float("nan"), "", "x", "../x", "\ud83d", "\x00", "2:4", "1e9", "uint16", "float16", [], [1], {},
    {"a": 1}, [[[]]], {"x": {"y": []}},
]  # fmt: skip


class TooLong(BaseException):
    """A reader that does not come back. No reader may take it for an error of the file."""


@contextmanager
def patience() -> Iterator[None]:
    """Raise ``TooLong`` in a block that takes more than ``PATIENCE`` seconds."""

    def too_long(*_: object) -> None:
        raise TooLong(f"more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def mutated(value: Any, choose: random.Random) -> Any:
    """A copy with one to three odd values, dropped keys or new keys."""
    value = copy.deepcopy(value)
    for _ in range(choose.randint(1, 3)):
        *way, last = choose.choice([path for path in places(value) if path] or [(None,)])
        if last is None:
            return choose.choice(ODD)
        place = value
        for key in way:
            place = place[key]
        what = choose.random()
        if what < 0.15 and isinstance(place, dict):
            del place[last]
        elif what < 0.25 and isinstance(place, dict):
            place[str(choose.choice(ODD))] = choose.choice(ODD)
        else:
            place[last] = copy.deepcopy(choose.choice(ODD))
    return value


def mutated_bytes(data: bytes, choose: random.Random) -> bytes:
    """A copy with some other bytes, odd numbers, a part cut out, or an end cut off."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 6)):
        place = choose.randrange(len(changed))
        if choose.random() < 0.7:
            changed[place] = choose.randrange(256)
        else:  # a length or an offset
            odd = choose.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1])
            changed[place : place + 8] = odd.to_bytes(8, "little")
    if choose.random() < 0.3:
        start = choose.randrange(len(changed))
        del changed[start : start + choose.choice([1, 7, len(changed)])]
    return bytes(changed)


def share_of(count: int) -> int:
    """How many of ``count`` mutations a run tries: all at night, else a third, and 60 at least.
    Each seed is a mutation, the same in every run.
    """
    return count if IS_NIGHTLY else min(count, max(count // 3, 60))


def put(path: Path, data: bytes) -> None:
    """Write a new file in the place of an old one. ext4 sends a file that is cut to nothing and
    written again to the disk at once, which takes longer than a reader of it.
    """
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def survives(
    read: Callable[[], Any], write: Callable[[random.Random], None], count: int = MUTATIONS
) -> Counter[str]:
    """How often a mutated file was read and refused; both must come up. ``write`` gets a seeded
    choice. ``count`` is that of a night (``share_of``).
    """
    count = share_of(count)
    outcomes: Counter[str] = Counter()
    reset_peak()
    start = peak_mib()
    for seed in range(count):
        write(random.Random(seed))
        try:
            with patience():
                read()
            outcomes["read"] += 1
        except MegamaskError:
            outcomes["refused"] += 1
        except (Exception, TooLong) as error:  # what this test is about
            raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error
    grown = peak_mib() - start
    assert grown < SPARE_MIB, f"{grown:.0f} MiB more than before"
    assert outcomes["refused"] > count // 20 and outcomes["read"], outcomes
    return outcomes


def reset_peak() -> None:
    """Let the peak of the memory begin at what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The largest resident memory since ``reset_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def json_writer(path: Path, value: Any) -> Callable[[random.Random], None]:
    """Writes a mutation of a JSON value, of its values mostly and of its bytes."""
    whole = json.dumps(value).encode()

    def write(choose: random.Random) -> None:
        if choose.random() < 0.8:
            put(path, json.dumps(mutated(value, choose)).encode("utf-8", "surrogatepass"))
        else:
            put(path, mutated_bytes(whole, choose))

    return write


def bytes_writer(path: Path, data: bytes) -> Callable[[random.Random], None]:
    """Writes a mutation of bytes."""

    def write(choose: random.Random) -> None:
        put(path, mutated_bytes(data, choose))

    return write
