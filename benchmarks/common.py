"""Common parts of all benchmarks: timing of sides in turn, tables, and figures as JSON.

A side is a piece of work that is compared with other sides, for example masked against dense.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from megamask.learn.metrics.provenance import versions
from megamask.storage import write_json
from megamask.user_paths import path_argument

Work = Callable[[], object]


@dataclass(frozen=True)
class Timings:
    """Seconds of every round of every side.

    Round i of a side ran directly before or after round i of the other sides.
    """

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Median seconds of a side."""
        return statistics.median(self.seconds[side])

    def ratios(self, side: str, baseline: str) -> list[float]:
        """side / baseline for each round.

        Other work on the machine slows both sides of a round, so it changes the ratio little.
        """
        pairs = zip(self.seconds[side], self.seconds[baseline], strict=True)
        return [seconds / baseline_seconds for seconds, baseline_seconds in pairs]

    def ratio(self, side: str, baseline: str) -> dict[str, float]:
        """Median and quartiles of the ratios of all rounds."""
        ratios = self.ratios(side, baseline)
        quartiles = ratios * 3
        if len(ratios) > 1:
            quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        return dict(zip(("low", "median", "high"), quartiles, strict=True))


def interleave(
    sides: Mapping[str, Work], rounds: int, device: torch.device, warmup: int = 1, calls: int = 1
) -> Timings:
    """Time the sides in turn, A B A B ..., for ``rounds`` rounds.

    The first ``warmup`` rounds before them are not counted. A time covers ``calls`` calls one after
    the other and is that of one of them: on a GPU a single call is as short as its launch.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(warmup + rounds):
        for side, work in sides.items():
            begin = now(device)
            for _ in range(calls):
                work()
            if number >= warmup:
                seconds[side].append((now(device) - begin) / calls)
    return Timings({side: times or [float("nan")] for side, times in seconds.items()})


def now(device: torch.device) -> float:
    """Seconds on a clock, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: torch.device, bytes_each_way: int, rounds: int = 7) -> float:
    """Bytes per second, read plus written, of ``Tensor.copy_``.

    No pass over memory can be faster.
    """
    source = torch.zeros(bytes_each_way // 4, device=device)
    target = torch.empty_like(source)
    timings = interleave({"copy": lambda: target.copy_(source)}, rounds, device, warmup=2)
    return 2 * source.nbytes / timings.median("copy")


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    options.add_argument("--rounds", type=int, default=7, help="timed rounds of every side")
    options.add_argument(
        "--json", type=path_argument, metavar="FILE", help="also write the figures there"
    )
    return options


def machine(device: torch.device) -> dict[str, Any]:
    """Facts of the machine: parts, software and load, without the name of the host."""
    threads, load = torch.get_num_threads(), round(os.getloadavg()[0], 2)
    memory = round(psutil.virtual_memory().total / 2**30)
    facts = {
        "device": device.type,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": memory,
        "load_average": load,
    }
    return {**versions(), **facts}


def report(
    name: str, options: argparse.Namespace, figures: Mapping[str, Any], device: torch.device
) -> None:
    """Print the facts of the machine, and write the figures to ``--json`` if it is given."""
    facts = machine(device)
    part = f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores"
    if device.type == "cuda":
        part = facts["gpu"]
    print(
        f"\n{part}; torch {facts['torch']}; "
        f"load average {facts['load_average']} (benchmark included)"
    )
    if options.json is None:
        return
    given = {
        key: value.name if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key != "json"
    }
    content = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": facts,
        "options": given,
        "figures": dict(figures),
    }
    write_json(options.json, content)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, with text aligned to the left and numbers to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        ("-" * (width - 1) + ":") if right else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    ]
    print(f"\n### {title}\n")
    print("\n".join([line(list(columns)), line(rule), *map(line, cells)]))


def cell(value: object) -> str:
    """A value as text; a float has three to four significant digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
