"""The predictions of ``megamask plan`` against measurements of learning on random weights.

Memory by part, peak memory and the time of a step are compared.

python -m benchmarks.plan --model smollm2-135m --json plan.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.allocations import peak_bytes
from benchmarks.common import interleave, parser, report, table
from benchmarks.lab import Lab, add_model_options, architecture, open_lab, read_config
from benchmarks.memory import OTHER, count
from megamask.learn.evaluation import hard_mask_perplexity
from megamask.learn.learned_mask import save_learned_mask
from megamask.learn.method import GRADIENTS, HARD_CODES, LOGITS, MOMENTS, STEP_GRADIENTS, WEIGHTS
from megamask.learn.metrics.mask_stats import MaskStatistics
from megamask.learn.snapshot import Progress, Snapshots
from megamask.plan.hardware import GIB, GPUS, Device, device_named
from megamask.plan.memory import (
    EVALUATION,
    MASK_FILE,
    OTHER_WEIGHTS,
    RESUME,
    SNAPSHOT,
    STEP,
    memory_of,
)
from megamask.plan.time import time_of
from megamask.plan.workload import Workload


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the comparison."""
    options = read_options(argv)
    work = Workload(read_config(options), architecture(options)).check()
    with open_lab(options, steps=4 + options.rounds) as lab:
        device = lab.mesh.device
        held, peaks, seconds = measure(lab, options.rounds, options.moments)
    plan, time = memory_of(work, known_device(device)), time_of(work, known_device(device))
    predicted = {
        part: plan.state[part] for part in (WEIGHTS, LOGITS, GRADIENTS, MOMENTS, HARD_CODES)
    }
    predicted[OTHER] = plan.state[OTHER_WEIGHTS] + plan.state.get(STEP_GRADIENTS, 0.0)
    parts = {part: {"predicted": predicted[part], "measured": held[part]} for part in predicted}
    state = sum(plan.state.values())
    for moment, measured in peaks.items():
        working = sum(plan.moments[moment].values())
        parts[f"peak of {moment}"] = {"predicted": state + working, "measured": measured}
    rows = []
    for part, size in parts.items():
        ratio = size["predicted"] / max(size["measured"], 1)
        rows.append([part, size["predicted"] / GIB, size["measured"] / GIB, ratio])
    table("memory of tensors, GiB", ["part", "predicted", "measured", "predicted / measured"], rows)
    if options.rounds:
        table(
            "time",
            ["what", "predicted", "measured"],
            [["step, ms", time.seconds * 1e3, seconds * 1e3]],
        )
    figures = {
        "bytes": parts,
        "planned_parts": plan.parts,
        "seconds": {"predicted": time.seconds, "measured": seconds},
    }
    report("plan", options, figures, device)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.add_argument(
        "--moments", action="store_true", help="evaluation, mask file, snapshot and resume too"
    )
    add_model_options(options)
    return options.parse_args(argv)


def measure(
    lab: Lab, rounds: int, moments: bool = False
) -> tuple[dict[str, int], dict[str, float], float]:
    """(bytes held between steps, by part; peak bytes at every moment; median seconds of a step)."""
    learner, device, numbers = lab.learner, lab.mesh.device, iter(range(10**9))
    assert learner is not None
    mask_statistics = MaskStatistics(lab.masked_model, lab.mesh, lab.config.learn.state.track_flips)

    def step() -> None:
        mask_statistics(learner.step(next(numbers), lab.plan).first_draw)

    step()
    held = count(lab, mask_statistics)
    with tempfile.TemporaryDirectory() as folder:
        others = other_moments(lab, Path(folder)) if moments else {}
        works = {STEP: step, **others}
        peaks = {name: peak_of(work, device, held) for name, work in works.items()}
    return held, peaks, interleave({"step": step}, rounds, device).median("step")


def other_moments(lab: Lab, folder: Path) -> dict[str, Callable[[], object]]:
    """What a run does besides its steps, in the order of its life."""
    config, model = lab.config, lab.masked_model
    assert lab.learner is not None
    snapshots = Snapshots(folder / "snapshots", config, lab.mesh, model, lab.learner)
    section = config.evaluate
    windows = torch.randint(model.arch.vocab, (section.micro_batch, section.window))
    return {
        EVALUATION: lambda: hard_mask_perplexity(
            model, lab.mesh, {"random": windows}, section.micro_batch
        ),
        MASK_FILE: lambda: save_learned_mask(folder / "mask.safetensors", model, lab.mesh, {}, {}),
        SNAPSHOT: lambda: snapshots.save(Progress(step=1)),
        RESUME: snapshots.restore,
    }


def peak_of(work: Callable[[], object], device: torch.device, held: dict[str, int]) -> float:
    """The most bytes of tensors that exist at once during ``work``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return float(torch.cuda.max_memory_allocated(device))
    return float(sum(held.values()) + peak_bytes(work))


def known_device(device: torch.device) -> Device:
    """The planner's entry for this machine; an H100 stands in for a GPU that it does not know."""
    if device.type == "cpu":
        return device_named("cpu")
    name = torch.cuda.get_device_name(device).lower()
    large = torch.cuda.get_device_properties(device).total_memory > 60 * GIB
    a100 = "a100" if large else "a100-40"
    for word, known in (("h200", "h200"), ("a100", a100)):
        if word in name:
            return GPUS[known]
    return GPUS["h100"]


if __name__ == "__main__":
    sys.exit(main())
