"""Settings that every test shares. Helpers live beside the tests that use them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Processes that tests start find the package too, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
)
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# A thread of OpenMP that waits for others sleeps, and leaves its core to the worker beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from tests.compile_once import compile_once

compile_once()

# With it, tests also take every case of a rule that fewer cases show (launch/test.sh).
IS_NIGHTLY = os.environ.get("NIGHTLY") == "1"

# Small tensors: more threads only wait for each other. Workers side by side have a core each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


# In a fresh clone numba compiles every kernel, for seconds, and a process that needs the kernel
# meanwhile waits. The first two files compile most kernels, those of ``subset`` and those of
# ``categorical``; the next two need none and keep the other workers busy meanwhile.
FIRST = (
    "e2e/test_golden.py",
    "e2e/test_plan.py",
    "kernels/test_triton.py",
    "parity/test_smollm2.py",
)


MOST_THREADS = 200
THREADS = Path("/proc/self/task")


def pytest_runtest_teardown() -> None:
    """Collect the models that tests left behind, which hold process groups: a verb that ran in the
    test process leaves 48 threads of gloo until then.
    """
    if THREADS.exists() and len(os.listdir(THREADS)) > MOST_THREADS:
        gc.collect()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that workers side by side end together. Leave out the
    tests marked ``nightly`` unless NIGHTLY=1 or the command line asks for them.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    place = {name: number for number, name in enumerate(FIRST)}

    def order(item: pytest.Item) -> tuple[bool, int]:
        name = f"{item.path.parent.name}/{item.path.name}"
        return item.path not in slow, place.get(name, len(FIRST))

    items.sort(key=order)
    if IS_NIGHTLY or "nightly" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("nightly")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
