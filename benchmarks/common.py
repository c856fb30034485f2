"""What every benchmark needs: sides timed in turn, ratios pair by pair, a Markdown table, figures
as JSON.
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

Work = Callable[[], object]


@dataclass(frozen=True)
class Timings:
    """Seconds of every round of every side; round i of one side ran right beside round i of the
    others.
    """

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Median seconds of a side."""
        return statistics.median(self.seconds[side])

    def ratios(self, side: str, baseline: str) -> list[float]:
        """side / baseline, pair by pair: what slows the whole machine for a while touches both
        halves of a pair.
        """
        return [
            one / other
            for one, other in zip(self.seconds[side], self.seconds[baseline], strict=True)
        ]

    def ratio(self, side: str, baseline: str) -> dict[str, float]:
        """Median and quartiles of the pairs' ratios."""
        ratios = self.ratios(side, baseline)
        quartiles = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        return dict(zip(("low", "median", "high"), quartiles, strict=True))


def interleave(
    sides: Mapping[str, Work], rounds: int, device: torch.device, warmup: int = 1
) -> Timings:
    """Time the sides in turn, A B A B ..., ``rounds`` times after ``warmup`` rounds that do not
    count.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(warmup + rounds):
        for side, work in sides.items():
            begin = now(device)
            work()
            if number >= warmup:
                seconds[side].append(now(device) - begin)
    return Timings({side: times or [float("nan")] for side, times in seconds.items()})


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: torch.device, bytes_each_way: int, rounds: int = 7) -> float:
    """Bytes per second, read plus written, of ``Tensor.copy_``: what one pass over memory costs at
    best.
    """
    source = torch.zeros(bytes_each_way // 4, device=device)
    target = torch.empty_like(source)
    timings = interleave({"copy": lambda: target.copy_(source)}, rounds, device, warmup=2)
    return 2 * source.nbytes / timings.median("copy")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    options.add_argument("--rounds", type=int, default=7, help="timed rounds of every side")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return options


def machine(device: torch.device) -> dict[str, Any]:
    """The machine's parts, its software and how busy it is; no names of hosts."""
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
    """Print what the figures were measured with and write them to ``--json``, if one is given."""
    facts = machine(device)
    part = (
        facts["gpu"]
        if device.type == "cuda"
        else f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores"
    )
    print(
        f"\n{part}; torch {facts['torch']}; load average {facts['load_average']} (benchmark included)"
    )
    if options.json is not None:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        asked = {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key != "json"
        }
        write_json(
            options.json,
            {
                "benchmark": name,
                "date": date,
                "machine": facts,
                "options": asked,
                "figures": dict(figures),
            },
        )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table: text to the left, numbers to the right."""
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
    """A number with three to four significant digits; anything else as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
