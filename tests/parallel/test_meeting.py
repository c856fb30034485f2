"""The ranks meet before they form groups: who is missing, who was started otherwise, who shares
cores; and the groups get the times of the settings.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megamask
from megamask.config import Config
from megamask.errors import EXIT_UNAVAILABLE, ConfigError, DismissedError, LaunchError
from megamask.learn.kernel_check import with_proven_kernels
from megamask.parallel import roll_call
from megamask.parallel.mesh import Mesh, start
from megamask.parallel.roll_call import Roll, call_roll
from megamask.process.cores import usable_cores
from megamask.process.place import Place, this_place
from megamask.process.signals import Interrupted, StopRequest
from megamask.sparsity.kernels.numba_host import NumbaSampler
from megamask.sparsity.pattern import Pattern
from tests.parallel.ranks import meet_again, run_ranks


def settings(learn: dict[str, Any] | None = None, **parallel: Any) -> Config:
    return Config.model_validate({"device": "cpu", "parallel": parallel, "learn": learn or {}})


def hurried(minutes: float) -> Config:
    """Settings with a time below what a user can set."""
    config = settings()
    values = {**config.parallel.model_dump(), "start_minutes": minutes}
    parallel = type(config.parallel).model_construct(**values)  # without validation
    return Config.model_construct(**{**dict(config), "parallel": parallel})


def several_meetings(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    place, stop = this_place(), StopRequest()
    roll = call_roll(place, settings(threads=rank + 1), stop)  # its store lives as long
    found["sharers"] = roll.sharers
    meet_again()
    for what, config in {
        "setting": settings({"optimizer": {"lr": [1e-3, 2e-3, 3e-3][rank]}}),
        "version": settings(),
        "missing": hurried(0.02),
    }.items():
        megamask.__version__ = "0.0.1" if what == "version" and rank == 2 else "1"
        begin = time.monotonic()
        try:
            if not (what == "missing" and rank == 1):
                call_roll(this_place(), config, stop)
        except (ConfigError, DismissedError, LaunchError) as error:
            found[what] = type(error).__name__, str(error), time.monotonic() - begin
        meet_again()
    with start(settings(tp=3, timeout_minutes=7)) as mesh:
        world = dist.group.WORLD
        groups = {"world": world, "tp": mesh.tp_group, "dp": mesh.dp_group}
        found["minutes"] = {name: minutes(group) for name, group in groups.items()}
        found["from rank 0"] = [mesh.from_main(rank * 10 + 5), mesh.from_main(rank != 0)]
        mesh.require_same("letters", "abc")
        try:
            mesh.require_same("letters", "abc" if rank != 1 else "abx")
        except (DismissedError, LaunchError) as error:
            found["other"] = type(error).__name__, str(error), error.code
        try:
            mesh.require_same("words", {"a": [1, 2], "b": {"c": rank if rank == 1 else 0, "d": 3}})
        except (DismissedError, LaunchError) as error:
            found["other in depth"] = str(error)
        found["backends"] = backends_where_numba_fails(mesh)
    return found


def backends_where_numba_fails(mesh: Mesh) -> list[str]:
    """What the ranks sample with where numba works on all of them, is missing on rank 1, and
    errs on rank 2.
    """
    kernel, numba = NumbaSampler.mask_statistics, sys.modules.get("numba")

    def raising(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    def chosen() -> str:
        return with_proven_kernels(settings(tp=3), [Pattern(2, 4)], mesh).learn.sampling.backend

    found = [chosen()]
    if mesh.rank == 1:
        sys.modules["numba"] = None  # type: ignore[assignment]
    found.append(chosen())
    if mesh.rank == 1 and numba is None:
        del sys.modules["numba"]
    elif numba is not None:
        sys.modules["numba"] = numba
    if mesh.rank == 2:
        NumbaSampler.mask_statistics = raising  # type: ignore[assignment, method-assign]
    found.append(chosen())
    NumbaSampler.mask_statistics = kernel  # type: ignore[method-assign]
    return found


def minutes(group: Any) -> float:
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds / 60


def test_ranks_meet() -> None:
    ranks = run_ranks(several_meetings, 3)
    assert [one["sharers"] for one in ranks] == [3, 3, 3]  # one host, no core bound
    kinds = ["ConfigError", "DismissedError", "DismissedError"]
    for what in ("setting", "version"):
        assert [one[what][0] for one in ranks] == kinds
        assert all(one[what][2] < 30 for one in ranks)
    host = socket.gethostname()
    told = ranks[0]["setting"][1]
    assert told.startswith(f"learn.optimizer.lr = 0.002: rank 1 on {host} was started with this")
    assert "rank 0 with 0.001" in told
    assert ranks[0]["version"][1].startswith(f"version of megamask = '0.0.1': rank 2 on {host}")
    assert "rank 1 of 3 to start" in ranks[0]["missing"][1]
    assert "rank 0 on 127.0.0.1" in ranks[2]["missing"][1]
    assert {one["missing"][0] for one in (ranks[0], ranks[2])} == {"LaunchError"}
    assert [one["minutes"] for one in ranks] == [{"world": 7, "tp": 7, "dp": 7}] * 3
    assert [one["from rank 0"] for one in ranks] == [[5, 0]] * 3
    assert [one["backends"] for one in ranks] == [["auto", "torch", "torch"]] * 3
    assert [one["other"][0] for one in ranks] == ["LaunchError", "DismissedError", "DismissedError"]
    assert [one["other"][2] for one in ranks] == [EXIT_UNAVAILABLE] * 3
    assert f"rank 1 on {host} has other letters than rank 0: 'abx', on" in ranks[0]["other"][1]
    assert "other words than rank 0: b.c = 1, on rank 0 0. A" in ranks[0]["other in depth"]


def test_a_second_start_does_not_meet_the_first_ones_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun on two hosts keeps its store over restarts, and the host whose ranks did not fail
    counts none.
    """
    for name, value in (("USE_AGENT_STORE", "True"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [Place(rank, 2, 0, "127.0.0.1", agent.port) for rank in (0, 1)]

    def coming(pool: ThreadPoolExecutor, rank: int) -> Future[Roll]:
        return pool.submit(call_roll, ranks[rank], settings(start_minutes=1), StopRequest())

    with ThreadPoolExecutor(3) as pool:
        for start in range(3):
            one = coming(pool, 1)
            with pytest.raises(TimeoutError):  # rank 0 of this start has said nothing
                one.result(0.3)
            if start == 1:  # its rank 0 opens a list and dies before its word
                dist.PrefixStore("megamask", agent).set("list", "dead")
                with pytest.raises(TimeoutError):
                    one.result(0.3)
            rolls = [coming(pool, 0).result(10), one.result(10)]
            assert [roll.sharers for roll in rolls] == [2, 2]
            assert not rolls[0].store.check(["unique id of NCCL"])
            rolls[0].store.set("unique id of NCCL", str(start))
            assert rolls[1].store.get("unique id of NCCL").decode() == str(start)


def test_a_busy_port_is_named_at_once() -> None:
    with socket.create_server(("", 0)) as busy:
        place = Place(0, 2, 0, "127.0.0.1", busy.getsockname()[1])
        with pytest.raises(ConfigError, match=f"MASTER_PORT = {place.port}: a port that no other"):
            call_roll(place, settings(), StopRequest())


def test_an_unknown_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "UNKNOWN_HOST", 0.1)
    for rank in (0, 1):
        place = Place(rank, 2, 0, "no-such-host.invalid", 29500)
        with pytest.raises(ConfigError, match=r"MASTER_ADDR = 'no-such-host\.invalid'"):
            call_roll(place, settings(), StopRequest())


def test_a_signal_is_answered_while_ranks_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "QUIET", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    stop = StopRequest()
    stop.received = "SIGTERM"
    for rank in (0, 1):
        with pytest.raises(Interrupted, match="SIGTERM"):
            call_roll(Place(rank, 2, 0, "127.0.0.1", port), settings(), stop)


def test_ranks_that_are_bound_to_cores_of_their_own_share_none() -> None:
    def entry(machine: str, *numbers: int) -> dict[str, Any]:
        return {"machine": machine, "cores": list(numbers)}

    bound = [entry("a", 0, 1), entry("a", 2, 3), entry("b", 0, 1)]
    assert [roll_call._sharers(one, bound) for one in bound] == [1, 1, 1]
    loose = [entry("a", 0, 1), entry("a", 0, 1), entry("a", 1, 2), entry("a", 3)]
    assert [roll_call._sharers(one, loose) for one in loose] == [3, 3, 3, 1]
    assert usable_cores() == sorted(os.sched_getaffinity(0)) and json.dumps(usable_cores())
