"""The one place through which the command line runs a verb: on which ranks, and under which locks.

A verb whose ranks work together runs on all ranks. Any other verb runs on rank 0, and the other
ranks have nothing to do. Rank 0 holds the locks.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megamask.config import Config, run_paths
from megamask.errors import EXIT_OK
from megamask.process.lock import locked
from megamask.process.place import Place
from megamask.process.signals import StopRequest
from megamask.verbs.table import VERBS


def run_verb(
    name: str, config: Config, arguments: list[Any], place: Place, stop: StopRequest
) -> int:
    """Run a verb and return its exit code.

    Args:
        name: of the verb.
        config: the settings.
        arguments: the verb's own arguments object, if it has any.
        place: of this process.
        stop: the request to stop, for the verb that saves first.

    Raises:
        MegamaskError: see the verb; or another process writes an artefact of the verb.
    """
    verb, config = VERBS[name], in_run(config, arguments)
    given = {"stop": stop} if verb.saves_on_signal else {}

    def run() -> int:
        return importlib.import_module(verb.module).run(config, *arguments, **given) or EXIT_OK

    if not place.is_main:
        return run() if verb.is_parallel else EXIT_OK
    writes = artefacts(verb.writes, config, arguments)
    reads = [path for path in artefacts(verb.reads, config, arguments) if _is_inside(path, config)]
    with locked(f"megamask {name}", writes, reads):
        return run()


def in_run(config: Config, arguments: list[Any]) -> Config:
    """The settings of the run that the argument ``run`` of a verb names, if it names one."""
    run = getattr(arguments[0], "run", None) if arguments else None
    return config.model_copy(update={"run_dir": run}) if run else config


def artefacts(names: Iterable[str], config: Config, arguments: list[Any]) -> list[Path]:
    """The paths of artefacts.

    Args:
        names: of arguments of the verb, of ``RunPaths``, or of files of the run folder.
        config: the settings.
        arguments: the verb's own arguments object, if it has any.
    """
    paths = run_paths(config)
    found = []
    for name in names:
        if arguments and hasattr(arguments[0], name):
            given = getattr(arguments[0], name)
            found += [Path(given)] if given is not None else []
        else:
            found.append(getattr(paths, name, paths.run_dir / name))
    return found


def _is_inside(path: Path, config: Config) -> bool:
    """Whether an artefact lies in the run folder: a model of the user's gets no lock beside it."""
    return path.absolute().is_relative_to(Path(config.run_dir).absolute())
