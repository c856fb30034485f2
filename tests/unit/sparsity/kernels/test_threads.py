"""Sampling on several CPU threads: results in order, no deadlock when jobs nest, no failure
lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megamask.sparsity.kernels.numba_host import is_worker, side_by_side


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.05 if item == 0 else 0)
        return item * item

    assert list(side_by_side(slow_first, range(5))) == [0, 1, 4, 9, 16]


def test_two_items_run_at_the_same_time() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        meeting = threading.Barrier(2)  # breaks if one waits for the other to finish
        list(side_by_side(lambda _: meeting.wait(timeout=20), range(2)))
    finally:
        torch.set_num_threads(before)


def test_a_job_on_a_worker_does_not_wait_for_the_workers(threads: int) -> None:
    def outer(item: int) -> list[tuple[int, str]]:
        return list(
            side_by_side(lambda inner: (item + inner, threading.current_thread().name), range(3))
        )

    found = list(side_by_side(outer, [0, 10, 20, 30]))
    assert [[number for number, _ in one] for one in found] == [
        [ten + one for one in range(3)] for ten in (0, 10, 20, 30)
    ]
    assert all(len({name for _, name in one}) == 1 for one in found)


def test_the_caller_is_no_worker(threads: int) -> None:
    inside = list(side_by_side(lambda _: is_worker(), range(3)))
    assert inside == [threads > 1] * 3
    assert not is_worker()


def test_a_failure_reaches_the_caller(threads: int) -> None:
    def fails(item: int) -> int:
        if item == 3:
            raise ValueError("the fourth")
        return item

    with pytest.raises(ValueError, match="the fourth"):
        list(side_by_side(fails, range(6)))
