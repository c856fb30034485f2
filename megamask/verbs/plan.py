"""The verb plan: the memory, time and GPU-hours of a learning run, predicted. A run that cannot fit
is refused.
"""

from __future__ import annotations

from pathlib import Path

from megamask import storage
from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.evaluate.dense_budget import with_dense_budget
from megamask.plan.calibration import calibrated
from megamask.plan.fit import check_fits
from megamask.plan.hardware import GPUS, Device, device_named
from megamask.plan.memory import memory_of
from megamask.plan.plan_tables import (
    as_json,
    footer,
    headline,
    layer_table,
    memory_table,
    time_table,
)
from megamask.plan.saving import saving_lines
from megamask.plan.search import search, search_json, search_lines
from megamask.plan.time import time_of
from megamask.plan.workload import Workload
from megamask.terminal import tell
from megamask.verbs.own_arguments import PlanArguments
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.base_model import base_model
from megamask.weights.shapes import SHAPES, read_shape


def run(config: Config, arguments: PlanArguments) -> None:
    """Print the plan, or the best layouts of ``arguments.search`` GPUs, and write the figures to
    ``arguments.json`` if that is set.

    Raises:
        ConfigError: the run does not fit ``arguments.gpu`` or, without it, any GPU, and the message
            names the nearest settings that fit. With ``arguments.search``, no layout fits, and the
            message names the smallest. Also a layout, batch or model that cannot work; or
            ``arguments.json`` is a folder.
        ArtifactError: the model's config.json or ``arguments.calibrate`` cannot be read.
    """
    gpus = known_gpus(arguments)
    if arguments.json:
        storage.require_file_place(Path(arguments.json), "--json")
    arch = find_architecture(config, arguments.model)
    config = with_dense_budget(config, arch)
    if arguments.model:
        config = with_paper_batch(config, arch)
    if arguments.search:
        _search(config, arch, arguments, arguments.search, _target(arguments, gpus))
        return
    work = Workload(config, arch, arguments.dp).check()
    target = _target(arguments, gpus)
    if target.is_cpu:  # all ranks share the machine
        target = target.shared_by(work.tp * work.dp)
    devices = [target] if target.is_cpu else list(gpus.values())
    memories, times = (
        [memory_of(work, one) for one in devices],
        [time_of(work, one) for one in devices],
    )
    tables = [memory_table(memories[0]), time_table(work, devices, memories, times)]
    title = headline(work, arguments.model or config.model.hf or config.run_dir)
    texts = [[title], layer_table(work), *tables, saving_lines(work), footer(devices)]
    tell("\n\n".join("\n".join(lines) for lines in texts if lines))
    if arguments.json:
        storage.write_json(Path(arguments.json), as_json(work, devices, memories, times, target))
    check_fits(work.config, arch, target, work.dp, in_plan=True)


def known_gpus(arguments: PlanArguments) -> dict[str, Device]:
    """The GPUs of the table by name, with measured rates where ``--calibrate`` gives them."""
    gpus = dict(GPUS)
    if arguments.calibrate:
        name, device = calibrated(Path(arguments.calibrate))
        gpus[name] = device
    return gpus


def _target(arguments: PlanArguments, gpus: dict[str, Device]) -> Device:
    """The device that must hold the run: the given GPU, else the largest."""
    if arguments.gpu:
        return gpus.get(arguments.gpu) or device_named(arguments.gpu)
    return max(gpus.values(), key=lambda one: one.capacity)


def _search(
    config: Config, arch: Architecture, arguments: PlanArguments, gpus: int, device: Device
) -> None:
    if arguments.dp != 1:
        raise ConfigError(
            "--dp", arguments.dp, "is chosen by --search", "Leave one of the two arguments out."
        )
    if device.is_cpu:  # all ranks share the machine
        device = device.shared_by(gpus)
    found = search(Workload(config, arch), device, gpus)
    lines = [search_lines(found, device, gpus), footer([device])]
    tell("\n\n".join("\n".join(one) for one in lines))
    if arguments.json:
        storage.write_json(Path(arguments.json), search_json(found, device, gpus))


def find_architecture(config: Config, name: str | None = None) -> Architecture:
    """The architecture of the shape or folder ``name``, else of the run's Hugging Face folder, else
    of its converted weights.

    Raises:
        ConfigError: there is no model to plan for.
        ArtifactError: ``model.hf`` or ``model.megatron`` was given and cannot be read.
    """
    if name:
        return read_shape(name, ignore_keys=config.model.ignore_keys)
    paths = run_paths(config)
    for folder in (paths.hf, paths.weights):
        if (folder / "config.json").exists():
            return read_architecture(folder, config.model.ignore_keys)
    if config.model.megatron:
        return base_model(config).architecture()
    if config.model.hf:
        raise ArtifactError(
            paths.hf / "config.json",
            "is missing",
            "Correct model.hf, or name a shape with --model.",
        )
    raise ConfigError(
        "--model",
        None,
        f"one of {', '.join(SHAPES)}, or a Hugging Face folder",
        "Name one, or set model.hf.",
    )


def with_paper_batch(config: Config, arch: Architecture) -> Config:
    """The paper's batch (MaskLLM, Table 7) where the batch was not given: the defaults of the tree
    suit a laptop.
    """
    learn, data = config.learn.model_fields_set, config.data.model_fields_set
    open_keys = {
        "learn.micro_batch": "micro_batch" in learn,
        "learn.global_batch": "global_batch" in learn,
        "data.seq_length": "seq_length" in data,
    }
    paper = {
        "learn.micro_batch": 1,
        "learn.global_batch": 256,
        "data.seq_length": min(4096, arch.max_positions),
    }
    return (
        Workload(config, arch)
        .with_settings({key: paper[key] for key, is_given in open_keys.items() if not is_given})
        .config
    )
