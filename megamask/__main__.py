"""``python -m megamask VERB --config FILE key=value``. Nothing heavy is imported until a verb
runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import logging
import os
import platform
import select
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from typing import Any

import megamask
from megamask import machine_errors
from megamask.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNAVAILABLE,
    EXIT_USER_ERROR,
    DismissedError,
    MegamaskError,
    printable,
)
from megamask.process.place import Place, this_place
from megamask.process.signals import Interrupted, StopRequest, end_with, stop_on_signal
from megamask.terminal import PlainFormatter
from megamask.verbs.argument_field import words_of
from megamask.verbs.own_arguments import PlanArguments
from megamask.verbs.table import VERBS
from megamask.verbs.words import Request, build_arguments, parse, shortcuts_of

EXIT_PIPE = 128 + 13  # as shells say of a program that SIGPIPE ends: nobody reads its output
TURN = 5.0  # seconds that a rank leaves to rank 0 to tell an error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code (0 done, 2 user error, 69 another rank is missing or
    the machine failed for a moment, 75 interrupted after a snapshot, 128 + N stopped by signal N,
    141 nobody reads the output).

    A failed rank of several ends its process here: Python's own way out would wait for threads of
    backends that wait for other ranks, and the launcher's signal would end it without its code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with stop_on_signal() as stop:  # a signal is noted, and raised where it can be told
        try:
            code = _run(words, stop)
            stop.is_raising = False
        except Interrupted as signalled:  # at the very end
            stop.is_raising = False
            code = signalled.code
        if argv is None and code and (_is_of_several() or _has_joined()):
            end_with(code)
            logging.shutdown()
            _drop_output()
            sys.stderr.flush()
            os._exit(code)
    if argv is None:
        end_with(code)
    return code


def _is_of_several() -> bool:
    """Whether a launcher started this process as a rank of several."""
    try:
        return this_place().world > 1
    except MegamaskError:  # the variables contradict each other, and that has been told
        return False


def _has_joined() -> bool:
    """Whether this process has joined process groups, without importing torch for the answer."""
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_available() and module.is_initialized()


def _run(words: list[str], stop: StopRequest) -> int:
    place = Place()
    saves = bool(words) and words[0] in VERBS and VERBS[words[0]].saves_on_signal
    if isinstance(sys.stdout, io.TextIOWrapper):  # which cannot write every name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        stop.is_raising = True
        stop.raise_if_set()
        with _whole_output():
            if not words or "-h" in words or "--help" in words:
                print(_help_of(words[0]) if words and words[0] in VERBS else _help())
                return EXIT_OK if words else EXIT_USER_ERROR
            if words[0] == "--version":
                print(_versions())
                return EXIT_OK
            stop.is_raising = not saves
            place = this_place()
            with _log_shown(place):
                return _run_verb(parse(words), place, stop)
    except Interrupted as signalled:
        return _stopped(signalled, place, saves)
    except Exception as error:
        # An import that a signal interrupts may end as an error of its library.
        if stop.is_raising and stop.received is not None:
            return _stopped(Interrupted(stop.received), place, saves)
        is_unread = isinstance(error, BrokenPipeError) and _is_unread()
        _drop_output()
        if is_unread:
            return EXIT_PIPE
        told = error if isinstance(error, MegamaskError) else machine_errors.explained(error)
        if told is None and place.world == 1:
            raise
        if told is None:
            _say(f"error{place.label}: {traceback.format_exc()}")
            return EXIT_BUG
        has_turn = place.is_main or _is_first(stop)
        if has_turn and not isinstance(told, DismissedError):
            _say(f"error{place.label}: {printable(str(told))}")
        return EXIT_UNAVAILABLE if machine_errors.may_pass(error) else told.code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _stopped(signalled: Interrupted, place: Place, saves: bool) -> int:
    """Tell that a signal stopped the verb; the exit code."""
    if place.is_main and saves:
        _say(f"{signalled}: nothing to save yet; start again to begin")
    elif place.is_main:
        _say(f"{signalled}: stopped. Nothing half-written is left; start again to do it anew")
    return EXIT_INTERRUPTED if saves else signalled.code


def _run_verb(request: Request, place: Place, stop: StopRequest) -> int:
    # pydantic and yaml: not needed for --help
    from megamask.config.load import read_settings
    from megamask.verbs.dispatch import run_verb

    config, old_arguments = read_settings(request.recipe, request.overrides)
    verb = VERBS[request.verb]
    given = old_arguments.get(request.verb, {}) | request.arguments
    arguments = [build_arguments(request.verb, given)] if verb.fields else []
    if request.dry_run:
        if place.is_main:
            _show(request.verb, config, place)
        return EXIT_OK
    return run_verb(request.verb, config, arguments, place, stop)


@contextmanager
def _whole_output() -> Iterator[None]:
    """Write out at the end of the block what was printed, so that a failure is told."""
    yield
    if sys.stdout is not None:  # closed before Python started
        sys.stdout.flush()


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more; other pipes break too."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError):  # closed before Python started, or no file
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output() -> None:
    """Write out what was printed, and forget what stdout does not take: Python would fail on it at
    its end.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _say(text: str) -> None:
    print(f"megamask: {text}", file=sys.stderr, flush=True)


def _is_first(stop: StopRequest) -> bool:
    """Whether a rank other than 0 tells its error: rank 0 mostly finds the same error, and then
    the launcher ends this rank before its turn. A rank that ended before rank 0 has spoken would
    have the launcher end rank 0 instead.
    """
    end = time.monotonic() + TURN
    try:
        while time.monotonic() < end:
            stop.raise_if_set()
            time.sleep(0.05)
    except Interrupted:
        return False
    return True


def _show(name: str, config: Any, place: Place) -> None:
    """Print the resolved settings as a recipe, and for learn the plan's figures."""
    import yaml

    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if name == "learn":
        gpu = "cpu" if config.device == "cpu" else None
        arguments = PlanArguments(dp=max(1, place.world // config.parallel.tp), gpu=gpu)
        importlib.import_module(VERBS["plan"].module).run(config, arguments)


@contextmanager
def _log_shown(place: Place) -> Iterator[None]:
    """Send what verbs log to the terminal, from the main process; Megatron's remarks on optional
    packages stay out of it.

    The logger is given back as it was: a program that runs several verbs tells each message once,
    and to the stderr of its time.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    handler = logging.StreamHandler() if place.is_main else logging.NullHandler()
    handler.setFormatter(PlainFormatter())
    logger = logging.getLogger("megamask")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _help() -> str:
    return "\n".join(
        [
            "usage: megamask VERB [--config FILE] [key.sub=value ...] [--dry-run]",
            "",
            *(f"  {name:<9} {verb.summary}" for name, verb in VERBS.items()),
            "",
            "megamask VERB --help: its arguments and the settings that it reads.",
            "megamask settings: all settings. megamask recipes: what --config knows by name.",
            "megamask --version: the versions of megamask and what it stands on.",
        ]
    )


def _versions() -> str:
    """The versions of the program and of what it stands on, without importing them."""
    found = {}
    for package in ("torch", "megatron-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return "\n".join(
        f"{name} {version}"
        for name, version in {
            "megamask": megamask.__version__,
            **found,
            "python": platform.python_version(),
        }.items()
    )


def _help_of(name: str) -> str:
    """Arguments and settings of a verb."""
    from megamask.config.describe import as_text  # pydantic, no torch

    verb = VERBS[name]
    places = [
        words_of(one) if one.default is MISSING else f"[{words_of(one)}]" for one in verb.positional
    ]
    usage = " ".join(["usage: megamask", name, *places, "[--config FILE] [key.sub=value ...]"])
    rows = [(words_of(one), str(one.metadata["help"])) for one in verb.fields]
    rows += [(f"{flag} VALUE", verb.shortcuts[flag]) for flag in shortcuts_of(verb)]
    if "--dry-run" not in verb.flags:
        rows.append(("--dry-run", "print the resolved settings and stop"))
    width = max(len(words) for words, _ in rows) + 2
    lines = [usage, "", verb.summary, "", *(f"  {words:<{width}}{said}" for words, said in rows)]
    settings = as_text(verb.sections) if verb.sections else ""
    return "\n".join([*lines, *(["", settings] if settings else [])])


if __name__ == "__main__":
    sys.exit(main())
