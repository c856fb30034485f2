"""The data of a run directory for a report. A part that does not exist yet is empty."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megamask.config import Config, run_paths
from megamask.config.nested import flatten
from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet, load_masks
from megamask.masks.find import open_masks
from megamask.storage import read_json

Record = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        train, evaluations: records of ``metrics.jsonl``, one for each step, in order.
        results: content of ``results.json``, or {}.
        masks: method -> mask file.
        prior: the masks that learning started from; None when they are unknown or missing.
        settings: the resolved settings, as YAML.
        versions: versions of the packages of the learning run, or {}.
        seeds: the seeds of the settings.
    """

    train: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    prior: MaskSet | None = None
    settings: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


def read_run(config: Config) -> RunData:
    """Read the data in ``config.run_dir``.

    Raises:
        ArtifactError: there is nothing to report, or a file cannot be read.
    """
    paths = run_paths(config)
    records = read_metrics(paths.learn / "metrics.jsonl")
    masks = {path.stem: path for path in sorted(paths.masks.glob("*.safetensors"))}
    results = (
        read_json(paths.results, "Run the verb evaluate again.") if paths.results.exists() else {}
    )
    if not records and not masks and not results:
        raise ArtifactError(
            paths.run_dir,
            "holds no metrics, results or masks",
            "Run the verb prune, learn or evaluate first, or correct run_dir.",
        )
    versions = paths.learn / "versions.json"
    written = paths.learn / "config.yaml"
    return RunData(
        train=[record for record in records if record["kind"] == "train"],
        evaluations=[record for record in records if record["kind"] == "evaluation"],
        results=results,
        masks=masks,
        prior=_prior(config),
        settings=written.read_text()
        if written.exists()
        else yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        versions=read_json(versions, "Run the verb learn again.") if versions.exists() else {},
        seeds={"seed": config.seed, "calibration.seed": config.calibration.seed},
    )


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl`` in order of steps, the last one of each kind and step.

    A torn line, which a killed run can leave, is skipped.
    """
    if not path.exists():
        return []
    by_step: dict[tuple[int, str], Record] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            by_step[(int(record["step"]), str(record["kind"]))] = record
        except (ValueError, KeyError, TypeError):
            continue
    return [by_step[key] for key in sorted(by_step)]


def mask_provenance(path: Path) -> dict[str, str]:
    """The header of a mask file, flattened to dotted keys.

    Raises:
        ArtifactError: the file is no mask file.
    """
    masks = load_masks(path)
    known = flatten({key: value for key, value in masks.meta.items() if key != "tensors"})
    flat = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in known.items()
        if value not in (None, "", [])
    }
    weights = sum(math.prod(masks.shape(name)) for name in masks)
    return flat | {"linears": f"{len(masks):,}", "weights": f"{weights:,}"}


def _prior(config: Config) -> MaskSet | None:
    name = config.learn.prior.mask
    try:
        return None if name is None else open_masks(name, config)
    except ArtifactError:  # the prior masks may have been deleted
        return None
