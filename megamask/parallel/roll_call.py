"""The meeting of the ranks before any process group exists: who is there, and with which settings.

A process group that lacks a rank waits in silence and cannot be interrupted. So the ranks first
sign a list in the launcher's key-value store, in plain Python: a missing rank is named, a signal
is answered, and ranks with other settings are refused. Rank 0 reads the list and tells the rest.

torchrun keeps one store for all of its starts (``--max-restarts``; on several hosts always), and
its agents count their restarts apart, so nothing in the environment tells the starts apart. Each
process therefore has a number of its own, and rank 0 opens a list under its number. The others sign
the newest list that they find, and believe only a word of rank 0 that names their own number.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import socket
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

import megamask
from megamask.config import Config
from megamask.config.nested import flatten
from megamask.errors import ConfigError, DismissedError, LaunchError
from megamask.liveness import boot_id
from megamask.process.cores import usable_cores
from megamask.process.place import Place
from megamask.process.signals import StopRequest

log = logging.getLogger(__name__)
UNKNOWN_HOST = 30.0  # seconds until a host name that does not resolve is refused
QUIET = 15.0  # seconds of waiting before the first word about it
POLL = 0.05
DISMISSAL = 5.0  # seconds, after which a refusal does not wait for those who hear of it
# The only setting that may differ: hosts have other numbers of cores.
OWN = ("parallel.threads",)


@dataclass(frozen=True)
class Roll:
    """What the meeting found.

    Attributes:
        store: for the process groups.
        sharers: ranks that may run on a core of this rank, this rank included.
    """

    store: dist.Store
    sharers: int


def call_roll(place: Place, config: Config, stop: StopRequest) -> Roll:
    """Wait for all ranks, for ``parallel.start_minutes`` at most, and compare their settings.

    Raises:
        ConfigError: on rank 0, a setting or a version of another rank differs, or the port is
            taken; or the host of rank 0 is unknown.
        DismissedError: on the other ranks, where rank 0 refuses.
        LaunchError: a rank did not come.
        Interrupted: a signal came meanwhile.
    """
    wait = _Wait(60.0 * config.parallel.start_minutes, stop)
    board = dist.PrefixStore("megamask", _open_store(place, wait))
    entry = {
        "process": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": boot_id(),
        "cores": usable_cores(),
        "settings": _comparable(config),
    }
    try:
        return (_call if place.is_main else _answer)(board, place, entry, wait)
    except RuntimeError as error:  # of the store
        raise LaunchError(
            f"rank 0 on {place.master}:{place.port} ended before all ranks had come. Its own "
            f"output says why; start again. ({str(error).splitlines()[0]})"
        ) from error


def _call(board: dist.Store, place: Place, entry: dict[str, Any], wait: _Wait) -> Roll:
    """Open a list, wait until all have signed it, and tell the others what it says."""
    store = _sign(board, entry["process"], place, entry)
    board.set("list", entry["process"])
    verdict = _read_list(store, place, wait)
    store.set("verdict", json.dumps(verdict))
    if "key" in verdict:
        # The store ends with this process.
        end = wait.seconds + DISMISSAL
        while store.add("dismissed", 0) < place.world - 1 and wait.seconds < end:
            time.sleep(POLL)
        raise ConfigError(*(verdict[name] for name in ("key", "value", "allowed", "fix")))
    return Roll(store, verdict["sharers"][place.rank])


def _answer(board: dist.Store, place: Place, entry: dict[str, Any], wait: _Wait) -> Roll:
    """Sign the list of rank 0, and wait for its word on this process."""
    found, store = "", board
    while True:
        newest = board.get("list").decode() if board.check(["list"]) else ""
        if newest != found:
            found, store = newest, _sign(board, newest, place, entry)
        if found and store.check(["verdict"]):
            verdict = json.loads(store.get("verdict"))
            if entry["process"] in verdict["processes"]:
                break
        wait.a_moment(f"rank 0 on {place.master}:{place.port} to call the roll")
    if "key" in verdict:
        store.add("dismissed", 1)
        raise DismissedError("rank 0 refuses the settings")
    return Roll(store, verdict["sharers"][place.rank])


def _sign(board: dist.Store, name: str, place: Place, entry: dict[str, Any]) -> dist.Store:
    """Sign the list of that name; returns the part of the store that belongs to the list."""
    store = dist.PrefixStore(name, board)
    store.set(f"rank/{place.rank}", json.dumps(entry))
    return store


class _Wait:
    """A waiting time that ends, answers signals, and does not stay silent."""

    def __init__(self, seconds: float, stop: StopRequest) -> None:
        self._stop, self._begin = stop, time.monotonic()
        self._end, self._next_word = self._begin + seconds, self._begin + QUIET

    @property
    def seconds(self) -> float:
        """Since the begin."""
        return time.monotonic() - self._begin

    def a_moment(self, what: str) -> None:
        """Sleep a little on the way to ``what``.

        Raises:
            LaunchError: the time is over.
            Interrupted: a signal came.
        """
        self._stop.raise_if_set()
        now = time.monotonic()
        if now > self._end:
            minutes = (self._end - self._begin) / 60
            raise LaunchError(
                f"waited {minutes:g} minutes (parallel.start_minutes) for {what}. Look at the "
                "output of the ranks that are missing, and whether their hosts reach each other."
            )
        if now > self._next_word:
            self._next_word = now + 60
            log.warning("waiting for %s", what)
        time.sleep(POLL)


def _open_store(place: Place, wait: _Wait) -> dist.Store:
    """The store of rank 0, or of torchrun, which started one for its workers."""
    is_server = place.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = f"{place.master}:{place.port}"
    while not _resolves(place.master):
        if wait.seconds > UNKNOWN_HOST:
            allowed = f"a host name that {socket.gethostname()} knows"
            fix = "Set MASTER_ADDR to the name or the address of the host of rank 0."
            raise ConfigError("MASTER_ADDR", place.master, allowed, fix)
        wait.a_moment(f"{place.master} to become a known host")
    while not (is_server or _listens(place)):
        wait.a_moment(f"rank 0 to listen on {address}")
    try:
        return dist.TCPStore(
            place.master,
            place.port,
            is_master=is_server,
            timeout=datetime.timedelta(seconds=60),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            allowed = f"a port that no other program uses on {socket.gethostname()}"
            raise ConfigError("MASTER_PORT", place.port, allowed, "Set another port.") from error
        raise LaunchError(
            f"{address} (MASTER_ADDR, MASTER_PORT) is not the store of rank 0: "
            f"{str(error).splitlines()[0]}. Another program may listen there: set another port."
        ) from error


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False


def _listens(place: Place) -> bool:
    try:
        with socket.create_connection((place.master, place.port), timeout=2):
            return True
    except OSError:
        return False


def _read_list(store: dist.Store, place: Place, wait: _Wait) -> dict[str, Any]:
    """The word of rank 0: the processes that signed, and the sharers of every rank or the parts of
    a ConfigError.
    """
    ranks = range(place.world)
    while missing := [rank for rank in ranks if not store.check([f"rank/{rank}"])]:
        wait.a_moment(f"{_numbered(missing)} of {place.world} to start")
    entries = [json.loads(store.get(f"rank/{rank}")) for rank in ranks]
    processes = [entry["process"] for entry in entries]
    own = entries[0]["settings"]
    for rank, entry in enumerate(entries):
        theirs = entry["settings"]
        for key in sorted(own.keys() | theirs.keys()):
            if own.get(key) != theirs.get(key):
                return {
                    "processes": processes,
                    "key": key,
                    "value": theirs.get(key),
                    "allowed": f"rank {rank} on {entry['host']} was started with this value, "
                    f"rank 0 with {own.get(key)!r}",
                    "fix": "Start all ranks with the same recipe, overrides and versions.",
                }
    return {"processes": processes, "sharers": [_sharers(entry, entries) for entry in entries]}


def _sharers(entry: dict[str, Any], entries: list[dict[str, Any]]) -> int:
    own = set(entry["cores"])
    here = (other for other in entries if other["machine"] == entry["machine"])
    return sum(not own.isdisjoint(other["cores"]) for other in here)


def _numbered(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"


def _comparable(config: Config) -> dict[str, Any]:
    """All that must be the same on every rank, by the name that a message would give."""
    settings = flatten(config.model_dump(mode="json"))
    packages = {name: version(name) for name in ("torch", "megatron-core")}
    return {
        **{key: value for key, value in settings.items() if key not in OWN},
        "version of megamask": megamask.__version__,
        "version of python": platform.python_version(),
        **{f"version of {name}": found for name, found in packages.items()},
    }
