"""The kernels on one tile under NVIDIA's checkers of memory and of races: reads and writes out of
bounds, and hazards in shared memory, that no assertion sees.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from megamask.storage import write_json
from megamask.user_paths import path_argument

CHECKER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
FOUND = 9  # its exit code when it found something; the program's own are 0 and 1


def main(argv: list[str] | None = None) -> int:
    """Run each tool, print, write; 1 when a tool found something or a kernel is wrong. A checker
    that is not on this machine is a result.
    """
    options = read_options(argv)
    figures = {tool: check(tool, options) for tool in options.tools}
    for tool, said in figures.items():
        print(f"{tool}: {said}", flush=True)
    if options.json:
        write_json(options.json, figures)
    return int(any(said.startswith("failed") for said in figures.values()))


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    options.add_argument("--checker", default=CHECKER, help="the program of the checker")
    options.add_argument("--seconds", type=float, default=60, help="limit of each tool")
    options.add_argument("--json", type=path_argument)
    return options.parse_args(argv)


def command_of(tool: str, checker: str, device: str) -> list[str]:
    """The command line of a tool."""
    checked = [sys.executable, "-m", "benchmarks.gpu.one_tile", "--device", device]
    return [checker, "--tool", tool, "--error-exitcode", str(FOUND), *checked]


def check(tool: str, options: argparse.Namespace) -> str:
    """What a tool says of the kernels."""
    command = command_of(tool, options.checker, options.device)
    print(" ".join(command), flush=True)
    if shutil.which(options.checker) is None:
        return f"{options.checker} is not on this machine"
    try:
        code = subprocess.run(command, timeout=options.seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {options.seconds:.0f} s"
    said = {0: "nothing found", FOUND: f"failed: {tool} found something, see above"}
    return said.get(code, f"failed: exit code {code}")


if __name__ == "__main__":
    sys.exit(main())
