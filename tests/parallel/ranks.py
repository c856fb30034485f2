"""Run a function in every rank of a small job of real processes.

``from tests.parallel.ranks import run_ranks`` works in tests and in the processes. A job is a child
of the fork server (``tests/fork_server.py``) that imports the function's module and forks the
ranks, so the heavy imports are paid once for all jobs of a test process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fork_server import child_environment, fork_server

PORTS = 32  # rendezvous of one job


class RanksError(AssertionError):
    """A rank raised, died or hung; the message holds what the ranks printed."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300
) -> list[Any]:
    """``function(rank, *args)`` in ``world_size`` processes with the environment torchrun gives and
    one thread each.

    Args:
        function: top-level function of any module.
        world_size: number of processes.
        args: picklable.
        timeout: seconds for the whole job, imports included; then everything is killed.

    Returns:
        The results in rank order.

    Raises:
        RanksError: with the first failing rank's traceback, or where every rank hung.
    """
    code = function.__code__
    job = (
        code.co_filename,
        function.__module__,
        function.__qualname__,
        world_size,
        pickle.dumps(args),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps(job))
        _run_job(folder, f"{function.__qualname__} on {world_size} ranks", timeout)
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]


def meet_again() -> None:
    """Prepare for another rendezvous in the same job. On the old port, a rank that is early would
    still find the old store.
    """
    first, *rest = os.environ["NEXT_PORTS"].split(",")
    os.environ.update(MASTER_PORT=first, NEXT_PORTS=",".join(rest))


def _run_job(folder: Path, what: str, timeout: float) -> None:
    log, environment = folder / "log", child_environment()
    with log.open("wb") as output:
        job = fork_server(environment).call(
            "tests.parallel.ranks:lead",
            folder,
            stdout=output,
            stderr=output,
            environment=environment,
            cwd=Path.cwd(),
        )
    try:
        status = job.wait(timeout)
    except subprocess.TimeoutExpired:
        job.signal_group(signal.SIGABRT)  # faulthandler writes where every rank stands
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(2)
        raise RanksError(f"{what}: not done after {timeout:.0f} s\n{_tail(log)}") from None
    finally:
        job.close()
    if status:
        raise RanksError(f"{what}: failed\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-8000:]


def lead(folder: Path) -> int:
    """Fork the ranks and wait; the first that fails ends the job. Runs in a child of the fork
    server.

    Args:
        folder: holds the job, and receives the results.

    Returns:
        The exit code of the child.
    """
    file, module_name, qualified_name, world_size, packed = pickle.loads(
        (folder / "job").read_bytes()
    )
    function: Any = _load(module_name, file)
    for part in qualified_name.split("."):
        function = getattr(function, part)
    args, ports = pickle.loads(packed), free_ports()
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(folder, function, rank, world_size, ports, args))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    waiting: dict[Any, Any] = {rank.sentinel: rank for rank in ranks}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(sentinel)
            rank.join()
            if rank.exitcode:
                print(
                    f"rank {ranks.index(rank)} of {world_size} ended with exit code "
                    f"{rank.exitcode}",
                    flush=True,
                )
                for other in ranks:
                    other.kill()
                return 1
    return 0


def _rank(
    folder: Path,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    ports: list[str],
    args: tuple[Any, ...],
) -> None:
    import torch

    here, whole = str(rank), str(world_size)
    os.environ.update(RANK=here, LOCAL_RANK=here, WORLD_SIZE=whole, LOCAL_WORLD_SIZE=whole)
    os.environ.update(MASTER_ADDR="127.0.0.1", NEXT_PORTS=",".join(ports))
    meet_again()
    torch.set_num_threads(1)
    try:
        result = function(rank, *args)
    except BaseException:
        print(f"rank {rank} of {world_size}:\n{traceback.format_exc()}", flush=True)
        os._exit(1)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))


def _load(name: str, file: str) -> Any:
    """The module under the name that it has in the test process, so that its classes pickle."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def free_ports() -> list[str]:
    """Below the ports that systems hand out: a rank that calls before the store listens could be
    given that very port for itself.
    """
    found: list[str] = []
    for port in random.sample(range(10_000, 32_768), 4 * PORTS):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(str(port))
    return found[:PORTS]
