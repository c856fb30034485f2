"""Which kernels take the time of a step, masked and dense: one step of each, profiled.

``python -m benchmarks.gpu.step_kernels --model llama2-7b --layers 4 --micro 1 --seq 4096``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import now, parser, report, table
from benchmarks.lab import add_model_options, open_lab
from benchmarks.step import DENSE, MASKED, DenseSide

WARMUP = 2
SHOWN = 30
NAME = 90  # characters of a kernel's name that are shown
SPAN = "Optimizer."  # begins the name of a span that covers kernels: Optimizer.step#AdamW.step


def main(argv: list[str] | None = None) -> int:
    """Profile both sides, print, write."""
    options = read_options(argv)
    with open_lab(options, steps=WARMUP + 2) as lab:
        assert lab.learner is not None
        dense, numbers, device = DenseSide(lab), count(), lab.mesh.device
        sides: dict[str, Callable[[int], object]] = {
            MASKED: partial(_learn, lab),
            DENSE: dense.step,
        }
        figures = {side: profiled(step, numbers, device) for side, step in sides.items()}
    for side, found in figures.items():
        show(side, found)
    report("step_kernels", options, figures, device)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_model_options(options)
    return options.parse_args(argv)


def _learn(lab: Any, number: int) -> None:
    lab.learner.step(number, lab.plan)


def profiled(step: Callable[[int], object], numbers: Any, device: torch.device) -> dict[str, Any]:
    """Seconds of one step, and of it the seconds and calls of every kernel, the longest first."""
    for _ in range(WARMUP):
        step(next(numbers) % WARMUP)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    begin = now(device)
    step(0)
    plain = now(device) - begin
    with profile(activities=activities) as profiler:
        step(1)
        now(device)
    on_device = device.type == "cuda"
    rows = [
        {
            "kernel": event.key,
            "milliseconds": (
                event.self_device_time_total if on_device else event.self_cpu_time_total
            )
            / 1000,
            "calls": event.count,
        }
        for event in profiler.key_averages()
        if not on_device
        or (event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith(SPAN))
    ]
    rows.sort(key=lambda row: -row["milliseconds"])
    return {"seconds": plain, "kernels": rows}


def show(side: str, found: dict[str, Any]) -> None:
    """Print the longest kernels, and how busy they keep the device."""
    busy = sum(row["milliseconds"] for row in found["kernels"])
    launches = sum(row["calls"] for row in found["kernels"])
    rows = [
        [row["kernel"][:NAME], row["milliseconds"], row["calls"], row["milliseconds"] / busy]
        for row in found["kernels"][:SHOWN]
    ]
    table(f"{side}: kernels of one step", ["kernel", "ms", "calls", "share"], rows)
    print(
        f"\n{side}: {1000 * found['seconds']:.1f} ms a step without the profiler, "
        f"{busy:.1f} ms in {launches} kernels"
    )


if __name__ == "__main__":
    sys.exit(main())
