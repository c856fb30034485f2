"""The layouts of a learning run on a number of devices, ordered by their predicted GPU-hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from megamask.errors import ConfigError
from megamask.plan.fit import POLICIES, Settings, leaner_memories, written
from megamask.plan.hardware import GIB, GPUS_A_NODE, Device
from megamask.plan.memory import memory_of
from megamask.plan.time import Time, time_of
from megamask.plan.workload import Workload
from megamask.tables import table

SHOWN = 10  # rows of the table
MICRO_BATCHES = (1, 2, 4)  # tried beside the given one
CHANGES_MASKS = ("learn.memory", "learn.micro_batch")


@dataclass(frozen=True)
class Candidate:
    """A layout with settings that passes the layout checks.

    Attributes:
        settings: dotted key -> value, of every setting that differs from the given run.
        work: the run with these settings.
        device: the device of each rank.
    """

    settings: Settings
    work: Workload
    device: Device

    @cached_property
    def total(self) -> float:
        """Peak bytes of one rank over all moments."""
        return memory_of(self.work, self.device).total

    @cached_property
    def time(self) -> Time:
        """The seconds of a step."""
        return time_of(self.work, self.device)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.time.gpu_hours(self.work.config.learn.steps)

    @property
    def changed(self) -> tuple[str, ...]:
        """The settings that make other masks than the given run: the dtypes of the state, and the
        samples that share a draw or a sum. No other setting of the search has an effect on masks.
        """
        return tuple(key for key in CHANGES_MASKS if key in self.settings)

    @property
    def layout(self) -> str:
        """TP x DP."""
        return f"TP {self.work.tp} x DP {self.work.dp}"

    @property
    def overrides(self) -> str:
        """The settings, as written on the command line."""
        return " ".join(written(self.settings))


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: at most ``SHOWN`` candidates that fit: the best of each layout and memory state; first
            those that leave the masks as they are, each part from the fewest GPU-hours upwards.
        evaluated: how many candidates pass the layout checks.
        fitting: how many of them fit the device.
    """

    best: tuple[Candidate, ...]
    evaluated: int
    fitting: int


def search(work: Workload, device: Device, gpus: int) -> Found:
    """The best layouts of ``work`` on ``gpus`` devices.

    Args:
        work: the run; its layout is not kept, and its other settings are.
        device: the device of each rank, which must hold every moment of the run.
        gpus: how many devices.

    Raises:
        ConfigError: no layout passes the checks (the message is that of the first), or none fits
            the device, and the message names the smallest.
    """
    passing: list[Candidate] = []
    refusals: list[ConfigError] = []
    for settings, dp in space(work, gpus):
        try:
            passing.append(Candidate(settings, work.with_settings(settings, dp).check(), device))
        except ConfigError as error:
            refusals.append(error)
    if not passing:
        raise refusals[0]
    fitting = [one for one in passing if one.total <= device.capacity]
    if not fitting:
        smallest = min(passing, key=lambda one: one.total)
        raise ConfigError(
            "memory of a rank",
            f"{smallest.total / GIB:.1f} GiB",
            f"more than the {device.capacity / GIB:.1f} GiB of {device.title}, in the smallest of "
            f"{len(passing)} layouts on {gpus} devices",
            f"The smallest, {smallest.layout} with {smallest.overrides}, needs a device of "
            f"{smallest.total / GIB:.1f} GiB: choose a larger one with --gpu, or more devices.",
        )
    best: dict[tuple[object, ...], Candidate] = {}
    # A sort keeps the order of equals, in which the given value of a setting comes first.
    for one in sorted(fitting, key=lambda one: (bool(one.changed), one.gpu_hours, one.total)):
        best.setdefault((one.work.tp, one.settings.get("learn.memory")), one)
    return Found(tuple(best.values())[:SHOWN], len(passing), len(fitting))


def space(work: Workload, gpus: int) -> Iterator[tuple[Settings, int]]:
    """The settings that differ from those of ``work``, and the replicas, of every layout to try.

    The given value of a setting is tried first. Tensor parallelism stays within a node, and
    ``learn.memory`` goes to leaner names alone.
    """
    config = work.config
    given: Settings = {
        "parallel.sequence_parallel": config.parallel.sequence_parallel,
        "parallel.recompute": config.parallel.recompute,
        "learn.optimizer.distributed": config.learn.optimizer.distributed,
        "learn.memory": config.learn.memory,
        "learn.micro_batch": config.learn.micro_batch,
    }
    for tp in range(1, min(gpus, GPUS_A_NODE) + 1):
        if gpus % tp:
            continue
        dp = gpus // tp
        parallel, distributed = config.parallel, config.learn.optimizer.distributed
        axes: dict[str, tuple[object, ...]] = {
            "parallel.sequence_parallel": (
                _first(parallel.sequence_parallel, (False, True)) if tp > 1 else (False,)
            ),
            "parallel.recompute": _first(parallel.recompute, POLICIES),
            "learn.optimizer.distributed": _first(distributed, (False, True) if dp > 1 else ()),
            "learn.memory": (config.learn.memory, *leaner_memories(config)),
            "learn.micro_batch": _first(config.learn.micro_batch, MICRO_BATCHES),
        }
        for values in product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            changed = {key: value for key, value in chosen.items() if value != given[key]}
            yield {"parallel.tp": tp, **changed}, dp


def _first(given: object, values: tuple[object, ...]) -> tuple[object, ...]:
    """``given``, then the other ``values``."""
    return (given, *(value for value in values if value != given))


def search_lines(found: Found, device: Device, gpus: int) -> list[str]:
    """The table of a search, and what its settings change, as lines of text."""
    rows = [
        [
            one.layout,
            f"{one.total / GIB:,.1f}",
            f"{one.time.seconds:,.2f}",
            f"{one.gpu_hours:,.1f}",
            "others" if one.changed else "the same",
            one.overrides,
        ]
        for one in found.best
    ]
    columns = ["layout", "GiB of a rank", "step, s", "GPU-hours", "masks", "settings to add"]
    return [
        f"The best of each layout and memory state on {gpus} x {device.title}, of "
        f"{found.evaluated:,} that pass the checks and {found.fitting:,} that fit:",
        "",
        *table(columns, rows),
        "",
        "Layout, sequence parallelism, recomputation and a distributed optimizer do not change the "
        "masks. learn.memory changes the dtypes of the state, and learn.micro_batch which samples "
        "share a draw or a sum: the run then learns other masks, and leanest, at a third of the "
        "rate, may need more steps. learn.sampling.draws stays as given.",
    ]


def search_json(found: Found, device: Device, gpus: int) -> dict[str, Any]:
    """The figures of a search in bytes and seconds, for ``plan --search --json``."""
    return {
        "predicted": "not measured",
        "device": device.title,
        "gpus": gpus,
        "evaluated": found.evaluated,
        "fitting": found.fitting,
        "best": [
            {
                "tp": one.work.tp,
                "dp": one.work.dp,
                "settings": one.settings,
                "overrides": one.overrides,
                "changes_masks": list(one.changed),
                "total_bytes": one.total,
                "step_seconds": one.time.seconds,
                "gpu_hours": one.gpu_hours,
            }
            for one in found.best
        ],
    }
