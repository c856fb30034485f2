"""The settings and the text that decide what a run makes, for the hashes of all studies, and the
model and the machine in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamask.config import Config
from megamask.config.deciding import deciding_settings
from megamask.data.shards import SPLITS, read_shards
from megamask.optim.optimizers import decay_rates
from megamask.storage import read_json
from megamask.weights.architecture import read_architecture
from megamask.weights.model_identity import FINGERPRINT
from studies.child import AGAIN

MAKING = (  # what one-shot masks, and masks that stand on them, are made with
    "dtype",
    "pattern",
    "pattern_overrides",
    "model",
    "data",
    "calibration",
    "prune",
)
LEARNING, MEASURING = ("learn",), ("evaluate",)
# The model counts by its fingerprint, and a seed has a folder of its own.
ELSEWHERE = ("model.hf", "model.megatron", "model.gguf")
DEFAULTS = Path(__file__).with_name("defaults.json")


def deciding(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value of the settings that decide a result, where they differ from those of
    ``defaults.json``.

    That file has the defaults of 2026-11-27 and is not edited. So a setting that megamask gets
    later changes no hash as long as it has its default, and a default that changes later changes
    the hash of every run that has it: tables never mix results under two defaults.
    """
    before = _settings(Config(), sections) | read_json(DEFAULTS, AGAIN)
    return {
        key: value
        for key, value in _settings(config, sections).items()
        if key not in ELSEWHERE and (key not in before or value != before[key])
    }


def _settings(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    """The deciding settings. Those of learning have the decay rates that follow from the run, and
    the micro-batch: a run may go on with another micro-batch, but masks with noise are drawn for
    each.
    """
    found = deciding_settings(config, sections)
    if "learn" not in sections:
        return found
    return found | {
        "learn.optimizer.betas": list(decay_rates(config)),
        "learn.micro_batch": config.learn.micro_batch,
    }


def text_digests(shards: Path) -> dict[str, list[str]]:
    """Domain -> digests of its training and held-out tokens, of the domains that are there: files
    may change under the names that the settings have.
    """
    return {
        folder.name: [read_shards(folder).content_sha256(split) for split in SPLITS]
        for folder in sorted(shards.iterdir() if shards.is_dir() else [])
        if (folder / "meta.json").exists()
    }


def model_line(base: Path) -> str:
    """The model of a prepared run, in a few words."""
    arch = read_architecture(base / "weights")
    fingerprint = read_json(base / "weights" / "megamask.json", AGAIN)[FINGERPRINT]
    return (
        f"{arch.family}, {arch.num_layers} layers of width {arch.hidden}, fingerprint "
        f"{fingerprint[:12]}"
    )


def machine(software: Mapping[str, str]) -> str:
    """The device and the packages of a result."""
    device = software["gpu"] if software["gpu"] != "absent" else software["cpu"]
    return f"{device}, torch {software['torch']}, megatron-core {software['megatron-core']}"


def between(days: Sequence[str]) -> str:
    """The first and the last day, or the only one."""
    return " to ".join(dict.fromkeys([min(days), max(days)]))
