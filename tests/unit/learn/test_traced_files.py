"""How many files a reader must open to follow one learning step of the default method."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import megamask
from megamask.learn.gumbel import GradientLearner
from tests.unit.learn.one_rank import tiny_config, tiny_masked_model, tiny_plan

PACKAGE = Path(megamask.__file__).parent
MAX_FILES = 15


def files_run_by(work: Callable[[], Any]) -> list[str]:
    """The files of megamask whose code runs in ``work``, on any thread, in the order of their first
    calls.

    Threads that exist already are not seen, unless they start to trace with their next call of a
    function of :mod:`threading`; new threads are.
    """
    found: dict[str, None] = {}

    def look(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found[path.relative_to(PACKAGE).as_posix()] = None

    before = sys.gettrace()
    trace_threads: Any = getattr(threading, "settrace_all_threads", threading.settrace)  # 3.12
    trace_threads(look)
    sys.settrace(look)
    try:
        work()
    finally:
        sys.settrace(before)
        trace_threads(None)
    return list(found)


def test_a_step_of_the_default_method_takes_few_files() -> None:
    config = tiny_config()
    with tiny_masked_model(config) as (mesh, masked_model):
        learner, plan = GradientLearner(config, mesh, masked_model), tiny_plan(config, mesh)
        learner.step(0, plan)  # what the first step builds is no part of the others
        files = files_run_by(lambda: learner.step(1, plan))
    print("\n".join(files))
    assert "learn/gumbel.py" in files and "sparsity/kernels/numba_host.py" in files
    assert len(files) <= MAX_FILES, files


def test_a_file_that_runs_on_another_thread_is_seen() -> None:
    from megamask.sparsity.pattern import Pattern

    def work() -> None:
        thread = threading.Thread(target=Pattern.parse, args=("2:4",))
        thread.start()
        thread.join()

    assert "sparsity/pattern.py" in files_run_by(work)
