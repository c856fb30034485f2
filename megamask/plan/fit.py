"""Whether a run fits a device, and the nearest settings that do when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megamask.config import Config
from megamask.config.presets import MEMORIES
from megamask.errors import ConfigError
from megamask.plan.hardware import CONTEXT_BYTES, GIB, GPUS, Device
from megamask.plan.memory import memory_of
from megamask.plan.workload import Workload
from megamask.weights.architecture import Architecture
from megamask.weights.mapping import check_tp

Settings = dict[str, object]
POLICIES: tuple[bool | str, ...] = (False, "mlp", True)  # of parallel.recompute, cheapest first


@dataclass(frozen=True)
class Remedy:
    """A change that may make a run fit.

    Attributes:
        names: the changed settings, as written on the command line.
        options: the options of ``plan`` that change.
        words: what these options mean, for a verb that does not have them.
        work: the run with these settings.
        device: the device that it would run on.
    """

    names: tuple[str, ...]
    options: tuple[str, ...]
    words: tuple[str, ...]
    work: Workload
    device: Device

    @property
    def total(self) -> float:
        """Peak bytes of one rank."""
        return memory_of(self.work, self.device).total

    @property
    def fits(self) -> bool:
        """Whether the settings can work together, and the device holds the run."""
        try:
            check_tp(self.work.arch, self.work.tp)  # bytes of a rank need whole shares
            if self.total > self.device.capacity:
                return False
            self.work.check()
        except ConfigError:
            return False
        return True


def check_fits(
    config: Config, arch: Architecture, device: Device, dp: int = 1, in_plan: bool = False
) -> None:
    """Check that a rank's peak memory fits ``device``.

    Args:
        config: the settings of a learning run.
        arch: the model.
        device: the device of each rank.
        dp: replicas of the model.
        in_plan: whether the message may name options of the verb plan.

    Raises:
        ConfigError: the run does not fit, and the message names the nearest settings that do; or
            as ``Workload.check``.
    """
    work = Workload(config, arch, dp).check()
    total = memory_of(work, device).total
    if total <= device.capacity:
        return
    allowed = f"more than the {device.capacity / GIB:.1f} GiB of {device.title}"
    fix = advice(work, device, in_plan)
    raise ConfigError("memory of a rank", f"{total / GIB:.1f} GiB", allowed, fix)


def check_free(config: Config, arch: Architecture, dp: int, free_bytes: float, title: str) -> None:
    """Check, before the model is loaded, that a run fits the free memory of a CUDA device.

    Args:
        config: the settings of a learning run.
        arch: the model.
        dp: replicas of the model.
        free_bytes: ``torch.cuda.mem_get_info()[0]``.
        title: the name of the device.

    Raises:
        ConfigError: see ``check_fits``.
    """
    # The plan counts a CUDA context, which is in use already and so not part of the free bytes.
    capacity = free_bytes + CONTEXT_BYTES
    device = replace(GPUS["h100"], title=f"{title} (free now)", capacity=capacity)
    check_fits(config, arch, device, dp)


def advice(work: Workload, device: Device, in_plan: bool) -> str:
    """A sentence that names the first remedy that fits, with options of ``plan`` or in words."""
    remedy = next((one for one in remedies(work, device) if one.fits), None)
    if remedy is None:
        return (
            "Nothing in reach fits: plan a smaller model, or keep layers dense with model.exclude."
        )
    size = f"{remedy.total / GIB:.1f} GiB on {remedy.device.title}"
    settings = " ".join([*remedy.names, *(remedy.options if in_plan else ())])
    beside = "" if in_plan or not remedy.words else f", with {' '.join(remedy.words)}"
    return f"The nearest that fits: {settings}{beside} ({size})."


def remedies(work: Workload, device: Device) -> Iterator[Remedy]:
    """Changes from the cheapest to the dearest, whether or not the run then fits: settings alone;
    more GPUs a layer, with settings; a larger GPU, with settings.
    """
    steps = list(ladder(work.config))
    if work.dp > 1 and not work.config.learn.optimizer.distributed:
        alone: Settings = {"learn.optimizer.distributed": True}
        # A distributed optimizer costs no time, so it comes first and with every other step.
        steps = [alone, *({**alone, **settings} for settings in steps)]
    yield from (_remedy(work, device, settings) for settings in steps)
    if not device.is_cpu:
        for tp in (2, 4, 8):
            world = max(work.tp * work.dp, tp)
            if tp > work.tp and world % tp == 0:
                for settings in [{}, *ladder(work.config)]:
                    yield _remedy(work, device, {"parallel.tp": tp, **settings}, dp=world // tp)
        for name, larger in GPUS.items():
            if larger.capacity > device.capacity:
                for settings in [{}, *ladder(work.config)]:
                    yield _remedy(work, larger, settings, device_name=name)


def ladder(config: Config) -> Iterator[Settings]:
    """Settings to change on the same devices, from the cheapest to the dearest.

    Sequence parallelism and regenerated masked weights come first, because they cost nothing or one
    more sampling pass; then recomputation, then an optimizer with less state, then smaller
    micro-batches.
    """
    is_shared = config.learn.sampling.span > 1
    if not config.parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if config.learn.state.masked_weight == "keep" and not is_shared:
        yield {"learn.state.masked_weight": "regenerate"}
    recompute: list[Settings] = [
        {"parallel.recompute": more}
        for more in POLICIES[POLICIES.index(config.parallel.recompute) + 1 :]
    ]
    yield from recompute
    leaner: list[Settings] = [{"learn.memory": name} for name in leaner_memories(config)]
    yield from leaner
    both = [{**again, **lean} for lean in leaner for again in recompute]
    yield from both
    micro = config.learn.micro_batch
    while micro % 2 == 0:
        micro //= 2
        smaller: Settings = {"learn.micro_batch": micro}
        yield from ({**smaller, **more} for more in [{}, *recompute, *both])


def _remedy(
    work: Workload, device: Device, settings: Settings, dp: int | None = None, device_name: str = ""
) -> Remedy:
    options, words = [], []
    if dp not in (None, work.dp):
        options.append(f"--dp {dp}")
        words.append(f"{dp} replica{'s' if dp != 1 else ''}, so as many processes as before")
    if device_name:
        options.append(f"--gpu {device_name}")
        words.append(f"GPUs like {device.title}")
    there = work.with_settings(settings, dp)
    return Remedy(tuple(written(settings)), tuple(options), tuple(words), there, device)


def written(settings: Settings) -> list[str]:
    """Settings as written on the command line."""
    return [f"{key}={str(value).lower()}" for key, value in settings.items()]


def leaner_memories(config: Config) -> list[str]:
    """The names of ``learn.memory`` that take less state than the given name, and take effect."""
    names = list(MEMORIES)  # from the largest state to the smallest
    leaner = names[names.index(config.learn.memory) + 1 :]
    return [name for name in leaner if memory_applies(config, name)]


def memory_applies(config: Config, name: str) -> bool:
    """Whether ``learn.memory=name`` would take effect: the settings of learn.state and
    learn.optimizer.kind that a recipe gives itself win over it.
    """
    given = _choices(config.model_dump(exclude_unset=True).get("learn", {}))
    present, wanted = (
        _choices(MEMORIES[config.learn.memory].get("learn", {})),
        _choices(MEMORIES[name]["learn"]),
    )
    own = {key: value for key, value in given.items() if present.get(key) != value}
    return name != config.learn.memory and all(
        wanted.get(key, value) == value for key, value in own.items()
    )


def _choices(learn: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``learn`` that decide the bytes per weight."""
    optimizer = learn.get("optimizer", {})
    return {
        **learn.get("state", {}),
        **({"kind": optimizer["kind"]} if "kind" in optimizer else {}),
    }
