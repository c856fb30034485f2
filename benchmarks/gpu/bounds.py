"""Which bound each sampling kernel hits, from Nsight Compute's counters: the memory, the issue of
instructions, or neither.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.common import table
from megamask.storage import write_json
from megamask.user_paths import path_argument

PROFILER = "ncu"
KERNELS = "regex:^(forward|backward)$"
MEMORY = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
ISSUE = "sm__inst_issued.avg.pct_of_peak_sustained_active"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
TIME = "gpu__time_duration.sum"
METRICS = (MEMORY, COMPUTE, ISSUE, WARPS, TIME)
NEAR = 60.0  # percent of a peak from which it counts as the bound; Nsight's own rule


def main(argv: list[str] | None = None) -> int:
    """Profile, print, write. A profiler that is missing or may not count is a result."""
    options = read_options(argv)
    command = command_of(options.profiler, options.device)
    print(" ".join(command), flush=True)
    figures: dict[str, Any] = {"kernels": []}
    if shutil.which(options.profiler) is None:
        figures["problem"] = f"{options.profiler} is not on this machine"
    else:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        print(ran.stdout, ran.stderr, flush=True)
        figures["kernels"] = kernels_of(ran.stdout.splitlines())
        if not figures["kernels"]:
            figures["problem"] = f"no counters, exit code {ran.returncode}; its words are above"
    if "problem" in figures:
        print(figures["problem"])
    else:
        rows = figures["kernels"]
        table("bounds of the kernels", list(rows[0]), [list(row.values()) for row in rows])
    if options.json:
        write_json(options.json, figures)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options.add_argument("--profiler", default=PROFILER, help="the program of the profiler")
    options.add_argument("--json", type=path_argument)
    return options.parse_args(argv)


def command_of(profiler: str, device: str) -> list[str]:
    """The command line: the third and fourth launch of a kernel, after it was compiled and ran."""
    counted = ["--clock-control", "none", "--launch-skip", "2", "-c", "2", "-k", KERNELS]
    shape = ("--shapes", "llama2-7b", "--only", "fc1") if device == "cuda" else ("--shapes", "toy")
    sampling = [sys.executable, "-m", "benchmarks.sampling", "--device", device, *shape]
    sampling += ["--masks", "subset/2:4", "--rounds", "1", "--copy-mib", "64"]
    return [profiler, *counted, "--csv", "--metrics", ",".join(METRICS), *sampling]


def kernels_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each profiled launch, from a table that names a metric in each line."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    table_lines = [line for line in lines if line.startswith('"')]
    for row in csv.DictReader(table_lines):
        number = float(row["Metric Value"].replace(",", ""))
        found.setdefault((row["ID"], row["Kernel Name"]), {})[row["Metric Name"]] = number
        if row["Metric Name"] == TIME:
            scale = {"us": 1.0, "usecond": 1.0, "ns": 1e-3, "nsecond": 1e-3, "ms": 1e3}
            found[row["ID"], row["Kernel Name"]][TIME] *= scale[row["Metric Unit"]]
    return [
        {
            "kernel": name,
            "us": counters[TIME],
            "memory %": counters[MEMORY],
            "compute %": counters[COMPUTE],
            "issue %": counters[ISSUE],
            "warps %": counters[WARPS],
            "bound": bound_of(counters),
        }
        for (_, name), counters in found.items()
    ]


def bound_of(counters: dict[str, float]) -> str:
    """The peak that a kernel is near to."""
    memory, compute = counters[MEMORY], max(counters[COMPUTE], counters[ISSUE])
    if max(memory, compute) < NEAR:
        return "latency: neither is near its peak"
    return "memory" if memory >= compute else "instructions"


if __name__ == "__main__":
    sys.exit(main())
