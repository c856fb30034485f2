"""The verb plan: memory, time and GPU-hours of a learning run, predicted; refuses what cannot fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamask import storage
from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.plan.fit import advice, check_fits
from megamask.plan.hardware import CONTEXT_BYTES, FRAGMENTATION, GIB, GPUS, LAUNCH_SECONDS, Device, device_named
from megamask.plan.memory import Memory, memory_of
from megamask.plan.time import Time, flops_per_token, time_of
from megamask.plan.workload import Workload
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.shapes import SHAPES, read_shape


def run(config: Config) -> None:
    """Print the plan, write ``plan.out`` if it is set.

    Raises:
        ConfigError: it fits neither ``plan.gpu`` nor, without that, any GPU; the message names the nearest settings that fit. Also a
            layout, a batch or a model that cannot work.
        ArtifactError: the model's config.json cannot be read.
    """
    arch = find_architecture(config)
    work = Workload(with_paper_batch(config, arch), arch, config.plan.dp).check()
    devices = [device_named("cpu")] if config.plan.gpu == "cpu" else list(GPUS.values())
    memories, times = [memory_of(work, one) for one in devices], [time_of(work, one) for one in devices]
    target = device_named(config.plan.gpu) if config.plan.gpu else max(devices, key=lambda one: one.capacity)
    tables = [memory_table(memories[0]), time_table(work, devices, memories, times)]
    print("\n\n".join("\n".join(lines) for lines in ([headline(work)], *tables, footer(devices))))
    if config.plan.out:
        storage.write_json(Path(config.plan.out), as_json(work, devices, memories, times, target))
    check_fits(work.config, arch, target, work.dp)


def find_architecture(config: Config) -> Architecture:
    """Of ``plan.model``, else of the run's Hugging Face folder, else of its converted weights.

    Raises:
        ConfigError: there is no model to plan for.
        ArtifactError: ``model.hf`` was given and cannot be read.
    """
    if config.plan.model:
        return read_shape(config.plan.model)
    paths = run_paths(config)
    for folder in (paths.hf, paths.weights):
        if (folder / "config.json").exists():
            return read_architecture(folder)
    if config.model.hf:
        raise ArtifactError(paths.hf / "config.json", "is missing", "Correct model.hf, or name a shape with --model.")
    raise ConfigError("--model", None, f"one of {', '.join(SHAPES)}, or a Hugging Face folder", "Name one, or set model.hf.")


def with_paper_batch(config: Config, arch: Architecture) -> Config:
    """The paper's batch (MaskLLM, Table 7) where ``plan.model`` was given and the batch was not: the defaults of the tree suit a laptop."""
    if not config.plan.model:
        return config
    learn, data = config.learn.model_fields_set, config.data.model_fields_set
    open_keys = {
        "learn.micro_batch": "micro_batch" in learn,
        "learn.global_batch": "global_batch" in learn,
        "data.seq_length": "seq_length" in data,
    }
    paper = {"learn.micro_batch": 1, "learn.global_batch": 256, "data.seq_length": min(4096, arch.max_positions)}
    return Workload(config, arch).changed({key: paper[key] for key, is_given in open_keys.items() if not is_given}).config


def headline(work: Workload) -> str:
    """What is planned."""
    config, learn = work.config, work.config.learn
    flops = sum(flops_per_token(work).values())
    options = [f"footprint {learn.footprint}", f"a draw per {learn.sampling.draws.replace('_', '-')}"]
    options += {False: [], "mlp": ["recompute of the mlp"], True: ["recompute"]}[config.parallel.recompute]
    options += ["sequence_parallel"] if config.parallel.sequence_parallel else []
    return (
        f"{config.plan.model or config.model.hf or config.run_dir}, {work.pattern}: "
        f"{work.all_masked_weights / 1e9:,.3f} B prunable weights, {flops / 1e9:,.2f} GFLOP a token\n"
        f"TP {work.tp} x DP {work.dp}; {learn.steps:,} steps of {learn.global_batch} x {config.data.seq_length:,} tokens; "
        f"on each replica {work.accumulations} micro-batches of {learn.micro_batch}; {', '.join(options)}"
    )


def memory_table(memory: Memory) -> list[str]:
    """GiB of one rank by part, and bytes per prunable weight of the parts that grow with the weights."""
    rows = [[part, f"{size / GIB:,.2f}"] for part, size in memory.parts.items() if size]
    return table(["memory of one rank, by part", "GiB"], [*rows, ["**sum**", f"{memory.total / GIB:,.2f}"]])


def time_table(work: Workload, devices: Sequence[Device], memories: Sequence[Memory], times: Sequence[Time]) -> list[str]:
    """Devices side by side."""
    fits = [memory.total <= device.capacity for device, memory in zip(devices, memories, strict=True)]
    rows = [["memory, GiB of GiB", *(f"{m.total / GIB:,.1f} of {d.capacity / GIB:,.1f}" for d, m in zip(devices, memories, strict=True))]]
    rows.append(["fits", *("yes" if one else "**no**" for one in fits)])
    used = [part for part in times[0].parts if any(time.parts[part] for time in times)]
    rows += [[f"{part}, ms", *(f"{t.parts[part] * 1e3:,.1f}" for t in times)] for part in used]
    rows.append(["**step, s**", *(f"{t.seconds:,.2f}" for t in times)])
    rows.append(["tokens/s", *(f"{t.tokens_per_second:,.0f}" for t in times)])
    rows.append(["model FLOP utilisation", *(f"{t.mfu:.0%}" for t in times)])
    steps, kind = work.config.learn.steps, "CPU" if devices[0].is_cpu else "GPU"
    rows.append([f"**{kind}-hours, {steps:,} steps**", *(f"{t.gpu_hours(steps):,.1f}" for t in times)])
    return table(["time of one step, by part", *(device.title for device in devices)], rows)


def footer(devices: Sequence[Device]) -> list[str]:
    """What the figures rest on."""
    lines = ["Predicted, not measured. Nothing overlaps in this model; start-up, evaluation and snapshots are not in it. It assumes:"]
    for one in devices:
        lines.append(
            f"- {one.title}: {one.flops / 1e12:,.3g} TFLOP/s dense bf16, of which matmuls reach {one.matmul:.0%} and attention "
            f"{one.attention:.0%}; memory {one.bandwidth / 1e9:,.0f} GB/s, of which {one.copy:.0%}; links {one.node_link / 1e9:,.0f} GB/s "
            f"each way in a node and {one.fabric / 1e9:,.0f} between nodes, of which {one.link:.0%}; {one.capacity / GIB:,.1f} GiB."
        )
    if not devices[0].is_cpu:
        lines.append(
            f"- {CONTEXT_BYTES / GIB:.1f} GiB for CUDA context, cuBLAS and NCCL; {FRAGMENTATION:.0%} of a step's own memory lost to "
            f"fragmentation; {LAUNCH_SECONDS * 1e3:.0f} ms of the host to launch a layer."
        )
    return lines


def as_json(work: Workload, devices: Sequence[Device], memories: Sequence[Memory], times: Sequence[Time], target: Device) -> dict[str, Any]:
    """The same figures in bytes and seconds."""
    steps = work.config.learn.steps
    rows = {}
    for device, memory, time in zip(devices, memories, times, strict=True):
        found = {"memory_bytes": memory.parts, "total_bytes": memory.total, "fits": memory.total <= device.capacity}
        found |= {"seconds": time.parts, "step_seconds": time.seconds, "tokens_per_second": time.tokens_per_second, "mfu": time.mfu}
        rows[device.title] = {**found, "gpu_hours": time.gpu_hours(steps), "assumed": asdict(device)}
    fits = memory_of(work, target).total <= target.capacity
    return {
        "predicted": "not measured",
        "prunable_weights": work.all_masked_weights,
        "flops_per_token": flops_per_token(work),
        "bytes_per_weight": work.state,
        "tokens_per_step": work.tokens_a_step,
        "devices": rows,
        "target": target.title,
        "advice": None if fits else advice(work, target),
        "settings": work.config.model_dump(include={"pattern", "dtype", "parallel", "learn", "plan"}),
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, the first column to the left, the others to the right."""
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if place else "-" * width for place, width in enumerate(widths)]
    return [line(columns), line(rule), *map(line, rows)]
