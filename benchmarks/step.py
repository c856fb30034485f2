"""A masked learning step, the report of its flips included, against the dense forward and backward
(dX and dW) of the same Megatron model.

python -m benchmarks.step --model smollm2-135m --json step.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from benchmarks.common import Timings, Work, interleave, parser, report, table
from benchmarks.eager import EagerSide
from benchmarks.lab import Lab, add_model_options, open_lab
from benchmarks.parts import Parts, time_parts
from megamask.learn.metrics.mask_stats import MaskStatistics
from megamask.learn.metrics.monitor import peak_memory_gib
from megamask.plan.hardware import GPUS
from megamask.plan.time import flops_per_token
from megamask.plan.workload import Workload

MASKED, DENSE, EAGER = "masked", "dense", "eager"
PART_ROUNDS = 3


class DenseSide:
    """The same model with plain weights: forward, dX and dW of every prunable linear, through the
    same schedule; no optimizer.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.weights = [linear.weight for linear in lab.masked_model.linears.values()]

    def step(self, number: int) -> None:
        """One global batch; the gradients are dropped at the end."""
        lab = self.lab
        with self._plain():
            get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=lab.plan.micro_batches(number),
                model=[lab.masked_model.model],
                num_microbatches=lab.plan.accumulations,
                seq_length=lab.config.data.seq_length,
                micro_batch_size=lab.plan.micro_batch,
                forward_only=False,
            )
            assert all(weight.grad is not None for weight in self.weights)

    def _forward(self, micro_batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        _, tokens, labels = next(micro_batches)
        device = self.lab.mesh.device
        losses = model.token_losses(tokens.to(device), labels.to(device))
        return losses, lambda output: (output.mean(), output.mean().detach())

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Weights that train, and none of the gradient sums that the learner put into the model's
        settings.
        """
        settings = self.lab.masked_model.model.config
        hooks = settings.no_sync_func, settings.finalize_model_grads_func
        settings.no_sync_func = settings.finalize_model_grads_func = None
        for weight in self.weights:
            weight.requires_grad_(True)
        self.lab.masked_model.model.train()
        try:
            yield
        finally:
            settings.no_sync_func, settings.finalize_model_grads_func = hooks
            for weight in self.weights:
                weight.requires_grad_(False)
                weight.grad = None


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 when the ratio is above ``--limit``."""
    arguments = sys.argv[1:] if argv is None else argv
    options = read_options(arguments)
    if options.only:
        return run_one_side(options)
    # Before anything large is held here: Linux starts a child's peak at its parent's memory.
    peaks = (
        {}
        if options.no_memory
        else {side: peak_memory(arguments, side) for side in (MASKED, DENSE)}
    )
    with open_lab(options, steps=2 + options.rounds + PART_ROUNDS) as lab:
        timings, parts = measure(lab, options.rounds, options.eager)
        seconds = {side: timings.median(side) for side in timings.seconds}
        device, tokens = lab.mesh.device, lab.tokens_per_step
        flops = sum(flops_per_token(Workload(lab.config, lab.masked_model.arch)).values()) * tokens
    ratio = timings.ratio(MASKED, DENSE)
    figures = {
        "ratio": ratio,
        "eager_over_masked": timings.ratio(EAGER, MASKED) if options.eager else None,
        "seconds": seconds,
        "tokens_per_second": {side: tokens / seconds[side] for side in seconds},
        "model_flops": flops,
        "utilisation": {side: used / seconds[side] for side in seconds}
        if (used := flops_share(flops, device))
        else None,
        "peak_memory_gib": peaks,
        "milliseconds_by_part": parts,
        "rounds": timings.seconds,
    }
    show(figures, options)
    report("step", options, figures, device)
    return int(options.limit is not None and ratio["median"] > options.limit)


def read_options(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_model_options(options)
    options.add_argument("--steps", type=int, dest="rounds", help="the same as --rounds")
    options.add_argument("--limit", type=float, help="fail when masked / dense is above it")
    options.add_argument(
        "--eager",
        action="store_true",
        help="also time the paper's method in plain eager PyTorch (benchmarks/eager.py)",
    )
    options.add_argument(
        "--no-memory",
        action="store_true",
        help="skip peak memory, which takes a process of its own for each side",
    )
    options.add_argument(
        "--only",
        choices=(MASKED, DENSE),
        help="run two steps of one side and write its peak memory",
    )
    return options.parse_args(arguments)


def measure(lab: Lab, rounds: int, with_eager: bool) -> tuple[Timings, dict[str, dict[str, float]]]:
    """(times of whole steps, milliseconds by part from steps of their own that carry timers)."""
    assert lab.learner is not None
    numbers = {side: iter(range(10**9)) for side in (MASKED, DENSE, EAGER)}
    dense, mask_statistics, device = (
        DenseSide(lab),
        MaskStatistics(lab.masked_model, lab.mesh, lab.config.learn.state.track_flips),
        lab.mesh.device,
    )
    sides: dict[str, Work] = {
        MASKED: partial(_learn, lab, mask_statistics, numbers[MASKED]),
        DENSE: lambda: dense.step(next(numbers[DENSE])),
    }
    if with_eager:
        eager = EagerSide(lab)
        sides[EAGER] = lambda: eager.step(next(numbers[EAGER]))
    timings = interleave(sides, rounds, device, warmup=2)
    counted: dict[str, Parts] = {MASKED: Parts(device), DENSE: Parts(device)}
    for _ in range(PART_ROUNDS):
        for side, parts in counted.items():
            with time_parts(lab, parts):
                sides[side]()
    return timings, {side: parts.medians() for side, parts in counted.items()}


def flops_share(flops: float, device: torch.device) -> float | None:
    """Seconds that the model's FLOPs take at the device's dense bf16 peak; None for a device whose
    peak is not in ``plan.hardware``.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next(
        (flops / gpu.flops for key, gpu in GPUS.items() if key.partition("-")[0] in name), None
    )


def _learn(lab: Lab, mask_statistics: MaskStatistics, numbers: Iterator[int]) -> None:
    """A step as a run does it: with the flips and confidences that it reports."""
    assert lab.learner is not None
    mask_statistics(lab.learner.step(next(numbers), lab.plan).first_draw)


def run_one_side(options: argparse.Namespace) -> int:
    """What a child process does for :func:`peak_memory`."""
    with open_lab(options, steps=2, with_learner=options.only == MASKED) as lab:
        dense = DenseSide(lab)
        for number in range(2):
            if lab.learner is not None:
                lab.learner.step(number, lab.plan)
            else:
                dense.step(number)
        options.json.write_text(json.dumps(peak_memory_gib(lab.mesh.device.type == "cuda")))
    return 0


def peak_memory(arguments: list[str], side: str) -> float:
    """Peak GiB of a process that only runs this side: its whole resident set, or what the CUDA
    allocator handed out.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peak.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.step",
            *arguments,
            "--only",
            side,
            "--json",
            str(file),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        peak: float = json.loads(file.read_text())
        return peak


def show(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables and the ratio."""
    ratio, seconds, peaks = figures["ratio"], figures["seconds"], figures["peak_memory_gib"]
    model = options.hf.name if options.hf else options.model
    rows = [
        [side, seconds[side] * 1000, figures["tokens_per_second"][side], peaks.get(side)]
        for side in seconds
    ]
    layers = f", {options.layers} layers" if options.layers else ""
    batch = f"{options.accumulate} x {options.micro} x {options.seq} tokens"
    table(
        f"{model}{layers}, {options.dtype}, {batch}",
        ["side", "ms a step", "tokens/s", "peak GiB"],
        rows,
    )
    limit = f"; at most {options.limit}" if options.limit else ""
    quartiles = f"quartiles {ratio['low']:.2f} to {ratio['high']:.2f}"
    print(f"\nmasked / dense: {ratio['median']:.2f} ({quartiles}){limit}")
    if options.eager:
        eager = figures["eager_over_masked"]
        quartiles = f"quartiles {eager['low']:.2f} to {eager['high']:.2f}"
        print(f"eager / masked: {eager['median']:.2f} ({quartiles})")
    if figures["utilisation"]:
        print(
            "model FLOP utilisation: "
            + ", ".join(f"{side} {share:.1%}" for side, share in figures["utilisation"].items())
        )
    by_part = figures["milliseconds_by_part"]
    names = list(dict.fromkeys([*by_part[MASKED], *by_part[DENSE]]))
    table(
        "milliseconds by part",
        ["part", *by_part],
        [[name, *(by_part[side].get(name) for side in by_part)] for name in names],
    )


if __name__ == "__main__":
    sys.exit(main())
