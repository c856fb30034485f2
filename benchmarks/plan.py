"""The predictions of ``megamask plan`` against measurements of learning on random weights.

Memory by part, peak memory and the time of a step are compared.

python -m benchmarks.plan --model smollm2-135m --json plan.json
"""

from __future__ import annotations

import sys

import torch

from benchmarks.allocations import peak_bytes
from benchmarks.common import interleave, parser, report, table
from benchmarks.lab import Lab, add_model_options, architecture, open_lab, read_config
from benchmarks.memory import OTHER, count
from megamask.learn.method import GRADIENTS, HARD_CODES, LOGITS, MOMENTS, STEP_GRADIENTS, WEIGHTS
from megamask.learn.metrics.mask_stats import MaskStatistics
from megamask.plan.hardware import GIB, GPUS, Device, device_named
from megamask.plan.memory import ALLOWANCE, OTHER_WEIGHTS, memory_of
from megamask.plan.time import time_of
from megamask.plan.workload import Workload


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the comparison."""
    known = parser(__doc__ or "")
    add_model_options(known)
    options = known.parse_args(argv)
    work = Workload(read_config(options), architecture(options)).check()
    with open_lab(options, steps=4 + options.rounds) as lab:
        device = lab.mesh.device
        held, peak, seconds = measure(lab, options.rounds)
    plan, time = memory_of(work, known_device(device)), time_of(work, known_device(device))
    predicted = {
        part: plan.state[part] for part in (WEIGHTS, LOGITS, GRADIENTS, MOMENTS, HARD_CODES)
    }
    predicted[OTHER] = plan.state[OTHER_WEIGHTS] + plan.state.get(STEP_GRADIENTS, 0.0)
    parts = {part: {"predicted": predicted[part], "measured": held[part]} for part in predicted}
    parts["peak"] = {"predicted": plan.total - plan.parts[ALLOWANCE], "measured": peak}
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


def measure(lab: Lab, rounds: int) -> tuple[dict[str, int], float, float]:
    """(bytes held between steps, by part; peak bytes; median seconds of a step)."""
    learner, device, numbers = lab.learner, lab.mesh.device, iter(range(10**9))
    assert learner is not None
    mask_statistics = MaskStatistics(lab.masked_model, lab.mesh, lab.config.learn.state.track_flips)

    def step() -> None:
        mask_statistics(learner.step(next(numbers), lab.plan).first_draw)

    step()
    held = count(lab, mask_statistics)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = sum(held.values()) + peak_bytes(step)
    return held, float(peak), interleave({"step": step}, rounds, device).median("step")


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
