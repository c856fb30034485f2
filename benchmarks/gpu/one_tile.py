"""Every kernel of a learning run once, on one ragged tile, against plain PyTorch: small enough to
run under a checker of memory or races.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megamask.config import Config, load_config
from megamask.learn.kernel_check import GROUPS, ROWS, sampling_problem, update_problem
from megamask.learn.methods import find_method
from megamask.model.fused.trial import activation_problem, rotation_problem
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.draw import Site
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.storage import write_json
from megamask.user_paths import path_argument

RUNS = {
    "subset": ["learn.method=subset"],
    "subset, hard": ["learn.method=subset", "learn.sampling.mode=hard"],
    "categorical": ["learn.method=categorical"],
    "lean": ["learn.method=subset", "learn.memory=lean"],
    "leanest": ["learn.method=subset", "learn.memory=leanest"],
}
WIDTH, HEADS, HEAD = 1100, (5, 2), 64  # of SwiGLU, no multiple of a block, and of the rotation


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 when a kernel is wrong."""
    options = read_options(argv)
    device = torch.device(options.device)
    found = {name: problem_of(words, device) for name, words in RUNS.items()}
    if device.type == "cuda":  # a CPU has no fused kernels
        dtype = torch.bfloat16
        found["SwiGLU"] = activation_problem(WIDTH, dtype, device)
        found["rotation"] = rotation_problem(HEADS, HEAD, dtype, device)
    for name, problem in found.items():
        print(f"{name}: {problem or 'ok'}", flush=True)
    if options.json:
        write_json(options.json, found)
    return int(any(found.values()))


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options.add_argument("--json", type=path_argument)
    return options.parse_args(argv)


def problem_of(words: list[str], device: torch.device) -> str:
    """What is wrong with the kernels of a run with these settings; empty if nothing is."""
    config: Config = load_config(None, [*words, "dtype=bf16", f"device={device.type}"])
    distribution = find_method(config.learn.method).distribution
    backend = choose_backend(config.learn.sampling.backend, device, distribution)
    if backend == "torch":
        return "no kernels here"
    site = Site(Pattern.parse(config.pattern), Placement.whole(ROWS, GROUPS), distribution)
    problem = sampling_problem(config, site, device, backend)
    return problem or update_problem(config, site, device, backend)


if __name__ == "__main__":
    sys.exit(main())
