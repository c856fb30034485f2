"""The text and the JSON of a plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megamask.plan.fit import advice
from megamask.plan.hardware import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    LAUNCH_SECONDS,
    Device,
)
from megamask.plan.memory import Memory, memory_of
from megamask.plan.saving import saving_of
from megamask.plan.time import Time, flops_per_token
from megamask.plan.workload import Workload
from megamask.tables import table
from megamask.weights.mapping import linear_shapes


def headline(work: Workload, name: str) -> str:
    """What is planned, for the model that ``name`` stands for."""
    config, learn = work.config, work.config.learn
    flops = sum(flops_per_token(work).values())
    options = [
        f"memory {learn.memory}",
        _draws(learn.sampling.draws),
    ]
    options += {False: [], "mlp": ["recompute of the mlp"], True: ["recompute"]}[
        config.parallel.recompute
    ]
    options += ["sequence_parallel"] if config.parallel.sequence_parallel else []
    tokens = f"{learn.global_batch} x {config.data.seq_length:,} tokens"
    micro_batches = f"{work.accumulations} micro-batches of {learn.micro_batch}"
    return (
        f"{name}, {work.plan}: {work.all_masked_weights / 1e9:,.3f} B prunable weights, "
        f"{flops / 1e9:,.2f} GFLOP a token\n"
        f"TP {work.tp} x DP {work.dp}; {learn.steps:,} steps of {tokens}; "
        f"on each replica {micro_batches}; {', '.join(options)}"
    )


def layer_table(work: Workload) -> list[str]:
    """A table of what has which pattern and what stays dense; nothing where all linears have one
    pattern.
    """
    shapes = linear_shapes(work.arch)
    sizes, counts = work.plan.weights_of(shapes), Counter(work.plan.values())
    dense = {name: shape for name, shape in shapes.items() if name not in work.plan}
    if len(sizes) == 1 and not dense:
        return []
    rows: list[tuple[str, int, int]] = [(str(one), counts[one], sizes[one]) for one in sizes]
    if dense:
        rows.append(("dense", len(dense), sum(map(math.prod, dense.values()))))
    whole = sum(size for *_, size in rows)
    cells = [[name, f"{count:,}", f"{size / whole:.1%}"] for name, count, size in rows]
    density = work.plan.density_of(shapes)
    cells.append(["**density**", f"{len(shapes):,}", f"{density:.1%}"])
    return table(["pattern", "linears", "weights of linears"], cells)


def memory_table(memory: Memory) -> list[str]:
    """A table of the GiB of one rank at the busiest moment, by part, and of the sum at every other
    moment.
    """
    rows = [[part, f"{size / GIB:,.2f}"] for part, size in memory.parts.items() if size]
    rows.append([f"**sum: {memory.busiest}**", f"{memory.total / GIB:,.2f}"])
    others = [one for one in memory.moments if one != memory.busiest]
    rows += [[f"sum: {one}", f"{memory.total_at(one) / GIB:,.2f}"] for one in others]
    return table(["memory of one rank, by part", "GiB"], rows)


def time_table(
    work: Workload, devices: Sequence[Device], memories: Sequence[Memory], times: Sequence[Time]
) -> list[str]:
    """A table of memory, seconds and GPU-hours with the devices side by side."""
    fits = [
        memory.total <= device.capacity for device, memory in zip(devices, memories, strict=True)
    ]
    rows = [
        [
            "memory, GiB of GiB",
            *(
                f"{m.total / GIB:,.1f} of {d.capacity / GIB:,.1f}"
                for d, m in zip(devices, memories, strict=True)
            ),
        ]
    ]
    rows.append(["fits", *("yes" if one else "**no**" for one in fits)])
    used = [part for part in times[0].parts if any(time.parts[part] for time in times)]
    rows += [[f"{part}, ms", *(f"{t.parts[part] * 1e3:,.1f}" for t in times)] for part in used]
    rows.append(["**step, s**", *(f"{t.seconds:,.2f}" for t in times)])
    rows.append(["tokens/s", *(f"{t.tokens_per_second:,.0f}" for t in times)])
    rows.append(["model FLOP utilisation", *(f"{t.mfu:.0%}" for t in times)])
    steps, kind = work.config.learn.steps, "CPU" if devices[0].is_cpu else "GPU"
    rows.append(
        [f"**{kind}-hours, {steps:,} steps**", *(f"{t.gpu_hours(steps):,.1f}" for t in times)]
    )
    return table(["time of one step, by part", *(device.title for device in devices)], rows)


def footer(devices: Sequence[Device]) -> list[str]:
    """The assumptions of the figures, as lines of text."""
    lines = [
        "Predicted, not measured. Nothing overlaps in this model; start-up, evaluation and "
        "snapshots are not in it. It assumes:"
    ]
    for one in devices:
        lines.append(
            f"- {one.title}: {one.flops / 1e12:,.3g} TFLOP/s dense bf16, of which matmuls reach "
            f"{one.matmul:.0%} and attention {one.attention:.0%}{_in_a_step(one)}; "
            f"memory {one.bandwidth / 1e9:,.0f} GB/s, of which {one.copy:.0%}; "
            f"links {one.node_link / 1e9:,.0f} GB/s each way in a node and "
            f"{one.fabric / 1e9:,.0f} between nodes, of which {one.link:.0%}; "
            f"{one.capacity / GIB:,.1f} GiB."
        )
    if not devices[0].is_cpu:
        lines.append(
            f"- {CONTEXT_BYTES / GIB:.1f} GiB for CUDA context, cuBLAS and NCCL; "
            f"{FRAGMENTATION:.0%} of a step's own memory lost to fragmentation; "
            f"{LAUNCH_SECONDS * 1e3:.0f} ms of the host to launch a layer."
        )
    return lines


def _in_a_step(device: Device) -> str:
    """What a step keeps of the rates of single kernels."""
    return "" if device.steady == 1 else f" alone and {device.steady:.0%} of that in a step"


def as_json(
    work: Workload,
    devices: Sequence[Device],
    memories: Sequence[Memory],
    times: Sequence[Time],
    target: Device,
) -> dict[str, Any]:
    """The figures in bytes and seconds, for ``plan --json``."""
    steps = work.config.learn.steps
    rows = {}
    for device, memory, time in zip(devices, memories, times, strict=True):
        found = {
            "memory_bytes": memory.parts,
            "total_bytes": memory.total,
            "busiest": memory.busiest,
            "total_bytes_at": {one: memory.total_at(one) for one in memory.moments},
            "fits": memory.total <= device.capacity,
        }
        found |= {
            "seconds": time.parts,
            "step_seconds": time.seconds,
            "tokens_per_second": time.tokens_per_second,
            "mfu": time.mfu,
        }
        rows[device.title] = {
            **found,
            "gpu_hours": time.gpu_hours(steps),
            "assumed": asdict(device),
        }
    fits, saving = memory_of(work, target).total <= target.capacity, saving_of(work)
    return {
        "predicted": "not measured",
        "prunable_weights": work.all_masked_weights,
        "layer_plan": {
            "patterns": {name: str(pattern) for name, pattern in work.plan.items()},
            "density": work.plan.density_of(linear_shapes(work.arch)),
        },
        "flops_per_token": flops_per_token(work),
        "bytes_per_weight": work.state,
        "tokens_per_step": work.tokens_a_step,
        "snapshot": {"bytes": saving.total_bytes, "seconds": saving.seconds},
        "devices": rows,
        "target": target.title,
        "advice": None if fits else advice(work, target, in_plan=True),
        "settings": work.config.model_dump(
            include={"pattern", "pattern_overrides", "dtype", "parallel", "learn"}
        ),
    }


def _draws(draws: str | int) -> str:
    if isinstance(draws, int) and draws > 1:
        return f"a draw per {draws} micro-batches of all replicas"
    return f"a draw per {'step' if draws == 'step' else 'micro-batch'}"
