"""The helper that runs ranks: results in order, a failure with its traceback, a hang that ends."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import RanksError, run_ranks


def sum_of_ranks(rank: int, offset: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    dist.init_process_group("gloo")
    total = offset + rank
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(os.environ["RANK"]), torch.get_num_threads(), total


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one has had enough")
    time.sleep(600)


def wait_for_a_rank_that_never_comes(rank: int) -> None:
    if rank == 0:
        dist.init_process_group("gloo")
    time.sleep(600)


def test_results_come_in_rank_order() -> None:
    expected = torch.tensor([1.0 + 2.0 + 3.0])  # offset 1, three ranks, plus 0 + 1 + 2
    results = run_ranks(sum_of_ranks, 3, torch.tensor([1.0]))
    assert [(rank, threads) for rank, threads, _ in results] == [(0, 1), (1, 1), (2, 1)]
    assert all(torch.equal(total, expected) for _, _, total in results)


def test_a_failing_rank_ends_the_job_with_its_traceback() -> None:
    begin = time.monotonic()
    with pytest.raises(RanksError, match="rank one has had enough"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - begin < 60  # not the ten minutes that the other rank sleeps


def test_a_rendezvous_that_hangs_fails_and_says_where() -> None:
    with pytest.raises(RanksError, match="init_process_group"):
        run_ranks(wait_for_a_rank_that_never_comes, 2, timeout=5)
