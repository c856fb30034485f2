"""Runs the program on several ranks as torchrun or srun would, without the time that torchrun
takes to start: a process for each rank, and SIGTERM to the others once a rank has failed.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from importlib import import_module
from typing import IO, Literal

from megamask.__main__ import main
from tests.e2e.program import RECIPE, Finished
from tests.fork_server import ROOT, child_environment, fork_server
from tests.parallel.ranks import free_ports

LIMIT = 100.0


def program(words: list[str], prepare: str | None) -> int:
    """The program, which leaves the process as it would for a user.

    Args:
        words: of the command line.
        prepare: ``module:function`` to call first, to bring about a fault.
    """
    if prepare:
        module, _, function = prepare.partition(":")
        getattr(import_module(module), function)()
    sys.argv = ["megamask", *words]
    return main()


def run_program(
    verb: str,
    *overrides: str,
    ranks: int = 2,
    prepare: str | None = None,
    launcher: Literal["torchrun", "srun"] | None = "torchrun",
) -> list[Finished]:
    """What each rank left behind, in rank order.

    Args:
        verb: what to run, with the debug recipe.
        overrides: more words.
        ranks: number of processes.
        prepare: see ``program``.
        launcher: whose variables the processes find; None starts processes that know nothing of
            each other.

    Raises:
        AssertionError: a rank did not end in time.
    """
    words = [verb, "--config", str(RECIPE), *overrides]
    port = free_ports()[0]
    children, begin = [], time.monotonic()
    for rank in range(ranks):
        environment = {**child_environment(), **_variables(launcher, rank, ranks, port)}
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        child = fork_server(child_environment()).call(
            "tests.e2e.ranks:program",
            words,
            prepare,
            stdout=out,
            stderr=err,
            environment=environment,
            cwd=ROOT,
        )
        children.append((child, out, err))
    ends: dict[int, float] = {}
    is_told = False
    try:
        while len(ends) < ranks and time.monotonic() - begin < LIMIT:
            for rank, (child, _, _) in enumerate(children):
                if rank not in ends and child.poll() is not None:
                    ends[rank] = time.monotonic() - begin
            if launcher and not is_told and any(children[rank][0].poll() for rank in ends):
                is_told = True
                time.sleep(0.1)
                for rank, (child, _, _) in enumerate(children):
                    if rank not in ends:
                        child.signal_group(signal.SIGTERM)
            time.sleep(0.02)
    finally:
        for child, _, _ in children:
            child.signal_group(signal.SIGKILL)
    found = []
    for rank, (child, out, err) in enumerate(children):
        said, told = (_text(file) for file in (out, err))
        assert rank in ends, f"rank {rank} of {verb} did not end\n{told[-4000:]}"
        found.append(Finished(child.wait(), said, told, ends[rank]))
    return found


def _variables(launcher: str | None, rank: int, ranks: int, port: str) -> dict[str, str]:
    found: dict[str, object] = {}
    if launcher == "torchrun":
        found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    elif launcher == "srun":
        found = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": ranks}
        found |= {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": "localhost"}
    return {key: str(value) for key, value in {**found, "MASTER_PORT": port}.items()}


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
