"""The CPU threads that sampling runs on: parts of one layer side by side, or whole layers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_local = threading.local()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work`` of every item on as many threads as PyTorch uses, results in the order of the items.

    In turn when there is one thread, or on one of these threads: a layer that is one thread's job
    is not cut up again.
    """
    threads = torch.get_num_threads()
    return map(work, items) if threads == 1 or is_worker() else _pool(threads).map(work, items)


def is_worker() -> bool:
    """Whether this is one of the threads of ``side_by_side``."""
    return getattr(_local, "is_worker", False)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="megamask-sampling", initializer=_enlist)


def _enlist() -> None:
    _local.is_worker = True
