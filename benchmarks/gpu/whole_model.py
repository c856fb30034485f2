"""The step of a whole model with the fastest settings that ``megamask plan`` says fit this device.

``python -m benchmarks.gpu.whole_model --model llama2-7b --seq 4096``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import step
from benchmarks.plan import known_device
from megamask.config import load_config
from megamask.errors import ConfigError
from megamask.parallel.mesh import choose_device
from megamask.plan.hardware import GIB
from megamask.plan.memory import memory_of
from megamask.plan.workload import Workload
from megamask.user_paths import path_argument
from megamask.weights.shapes import read_shape

# From the fastest to the smallest.
MEMORIES = ("default", "lean", "leanest")
# The dense side of the comparison holds the gradients of all weights in bf16, when the buffers of
# the learner are still there.
BYTES_OF_DENSE_GRADIENTS = 2


def main(argv: list[str] | None = None) -> int:
    """Choose settings, then measure as ``benchmarks.step``."""
    options = read_options(argv)
    device = choose_device(options.device)
    settings = settings_that_fit(options.model, options.seq, device, options.accumulate)
    if settings is None:
        print(f"no settings of {options.model} fit this device")
        return 1
    print(f"settings that fit: {' '.join(settings)}", flush=True)
    command = ["--device", options.device, "--model", options.model, "--micro", "1"]
    command += ["--seq", str(options.seq), "--accumulate", str(options.accumulate)]
    command += ["--rounds", "1" if device.type == "cpu" else "3", "--no-memory"]
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["--json", str(options.json)] if options.json else []
    return step.main([*command, *settings])


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="auto")
    options.add_argument("--threads", type=int)
    options.add_argument("--model", required=True)
    options.add_argument("--seq", type=int, default=64)
    options.add_argument("--accumulate", type=int, default=2)
    options.add_argument("--json", type=path_argument)
    return options.parse_args(argv)


def settings_that_fit(
    model: str, seq: int, device: torch.device, accumulate: int
) -> list[str] | None:
    """The first settings whose planned peak, gradients of the dense side included, fits the
    memory that is free.

    Args:
        model: a shape that ``megamask plan`` knows.
        seq: tokens of a sequence.
        device: where it must fit.
        accumulate: micro-batches of a step.

    Returns:
        ``key=value`` settings of megamask; None when nothing fits.
    """
    arch, known = read_shape(model, "--model"), known_device(device)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else known.capacity
    for settings in candidates():
        batch = ["learn.micro_batch=1", f"learn.global_batch={accumulate}"]
        config = load_config(None, [f"data.seq_length={seq}", "dtype=bf16", *batch, *settings])
        try:
            work = Workload(config, arch).check()
        except ConfigError:
            continue
        dense = BYTES_OF_DENSE_GRADIENTS * work.masked_weights
        if memory_of(work, known).total + dense <= free:
            needed = (memory_of(work, known).total + dense) / GIB
            print(f"planned peak {needed:.1f} GiB of {free / GIB:.1f} GiB")
            return settings
    return None


def candidates() -> Sequence[list[str]]:
    """Settings from the fastest to the smallest."""
    plain = ["learn.method=subset", "learn.sampling.draws=step"]
    return [
        [*plain, f"learn.memory={memory}", f"parallel.recompute={recompute}"]
        for recompute in ("false", "true")
        for memory in MEMORIES
    ]


if __name__ == "__main__":
    sys.exit(main())
