"""The data of a run directory for a report. A part that does not exist yet is empty."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megamask.config import Config, RunPaths, run_paths
from megamask.config.nested import flatten
from megamask.config.paths import LEARNED
from megamask.config.tree import PUBLISHED
from megamask.errors import ArtifactError, printable
from megamask.file_kinds import read_text
from megamask.masks.file import MaskSet, load_masks
from megamask.masks.find import open_masks
from megamask.masks.identity import PRIOR_SHA256, row_name
from megamask.masks.verify import pattern_facts
from megamask.report.own_rows import NO_MASKS, OwnMasks
from megamask.report.result_kinds import read_result_tables
from megamask.report.result_table import ResultTable
from megamask.safe_checkpoint import NOTE
from megamask.storage import is_number, is_text, lacks, read_object
from megamask.weights.model_identity import FINGERPRINT, model_facts_of

Record = dict[str, Any]
FIX = "Delete it, or run the verb learn again."
NUMBER = (int, float)
RECORD: dict[str, Any] = {"kind": str, "step": int, "tokens": NUMBER, "seconds": NUMBER}


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        train, evaluations: records of ``metrics.jsonl``, one for each step, in order.
        results: content of ``results.json``, perplexity of held-out documents, or {}.
        published: protocol of published tables -> content of its file, for those that are there.
        tables: of the other kinds of results, such as tasks.
        masks: method -> mask file.
        own: the masks whose files can be read, by which rows of results belong to the run.
        said: a sentence for the rows of results that were left out: they were measured on other
            masks than the run has now, or do not say on which.
        prior: the masks that learning started from; None when they are unknown or missing.
        settings: the resolved settings, as YAML.
        versions: versions of the packages of the learning run, or {}.
        seeds: the seeds of the settings.
    """

    train: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: list[ResultTable] = field(default_factory=list)
    masks: dict[str, Path] = field(default_factory=dict)
    own: OwnMasks = NO_MASKS
    said: list[str] = field(default_factory=list)
    prior: MaskSet | None = None
    settings: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)

    def by_protocol(self) -> dict[str, dict[str, Any]]:
        """Protocol -> perplexities under it, of those that are there."""
        return ({"heldout": self.results} if self.results else {}) | self.published


def read_run(config: Config) -> RunData:
    """Read the data in ``config.run_dir``.

    Raises:
        ArtifactError: there is nothing to report, or a file cannot be read.
    """
    paths = run_paths(config)
    records = read_metrics(paths.learn / "metrics.jsonl")
    masks, own = _masks(paths)
    each: dict[str, dict[str, Any]] = {}
    said: list[str] = []
    for protocol in ("heldout", *PUBLISHED):
        path = paths.results_under(protocol)
        found, why = own.rows_of(path.name, "evaluate", read_results(path), "perplexity")
        each |= {protocol: found} if found else {}
        said += why
    results = each.pop("heldout", {})
    tables = read_result_tables(paths.run_dir, own)
    if not records and not masks and not results and not each and not tables:
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
        published=each,
        tables=tables,
        masks=masks,
        own=own,
        said=said,
        prior=_prior(config, own.masks.get(LEARNED)),
        settings=read_text(written, FIX)
        if written.exists()
        else yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        versions=read_object(versions, "Run the verb learn again.", {})
        if versions.exists()
        else {},
        seeds={"seed": config.seed, "calibration.seed": config.calibration.seed},
    )


def _masks(paths: RunPaths) -> tuple[dict[str, Path], OwnMasks]:
    """The mask files by their names in tables and pictures, where a recovered model is called so;
    and the masks of those that can be read.
    """
    files, masks = {}, {}
    for path in sorted(paths.masks.glob("*.safetensors")):
        try:
            found = load_masks(path)
        except ArtifactError:  # whoever reads the file tells what is wrong
            files[printable(path.stem, kept="")] = path
            continue
        name = printable(row_name(path.stem, found.meta), kept="")
        files[name], masks[name] = path, found
    return files, OwnMasks(masks, _model_of(paths.run_dir))


def _model_of(run_dir: Path) -> dict[str, str]:
    """The fingerprint and the digest of the model that a run folder has converted; {} where nothing
    tells.
    """
    try:
        note = read_object(run_dir / "weights" / NOTE, "", {FINGERPRINT: str})
    except ArtifactError:
        return {}
    return {FINGERPRINT: note[FINGERPRINT], **model_facts_of(note)}


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl`` in order of steps, the last one of each kind and step.

    A torn line, which a killed run can leave, is skipped.
    """
    if not path.exists():
        return []
    by_step: dict[tuple[int, str], Record] = {}
    for line in read_text(path, FIX).splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(line)
            required = RECORD | ({"perplexity": dict} if record["kind"] == "evaluation" else {})
            if not lacks(record, required) and not lacks(kept := _numbers_of(record), required):
                by_step[(kept["step"], kept["kind"])] = kept
    return [by_step[key] for key in sorted(by_step)]


def _numbers_of(record: Record) -> Record:
    """The record without values that are no numbers, which another program may have written."""

    kept: Record = {key: value for key, value in record.items() if is_number(value)}
    by_domain = record.get("perplexity")
    if isinstance(by_domain, dict):
        there = {
            name: value
            for name, value in by_domain.items()
            if is_number(value, above=0) and is_text(name)
        }
        kept["perplexity"] = there
    return {**kept, "kind": record["kind"]}


def read_results(path: Path) -> dict[str, Any]:
    """The content of ``results.json``; {} where there is none.

    Raises:
        ArtifactError: the file holds something else than the verb evaluate writes.
    """
    if not path.exists():
        return {}
    fix = "Run the verb evaluate again."
    results = read_object(path, fix, {"perplexity": dict})
    tables = _by_row(path, results, fix)
    by_key = {key: results.get(key, {}) for key in ("seconds", "density", "mask_bytes")}
    tables |= by_key
    others = {key: results.get(key, {}) for key in ("protocol", "pattern")}
    for place, row in {**tables, **others}.items():
        if not isinstance(row, dict):
            raise ArtifactError(path, f"holds {type(row).__name__} at {place}", fix)
    if not all(is_text(one) for one in others["pattern"].values()):
        raise ArtifactError(path, "holds no text at pattern", fix)
    for place, row in tables.items():
        for name, value in row.items():
            above = 0 if place.startswith("perplexity.") else -1
            if value is not None and not is_number(value, above):
                raise ArtifactError(path, f"holds no number at {place}.{name}", fix)
    for key, row in by_key.items():
        if key in results:
            results[key] = {name: value for name, value in row.items() if value is not None}
    return results


def _by_row(path: Path, results: dict[str, Any], fix: str) -> dict[str, Any]:
    """``quantity.row`` -> values by domain.

    Raises:
        ArtifactError: a quantity is no table.
    """
    found: dict[str, Any] = {}
    for quantity in ("perplexity", "kl", "agreement"):
        rows = results.get(quantity, {})
        if not isinstance(rows, dict):
            raise ArtifactError(path, f"holds {type(rows).__name__} at {quantity}", fix)
        found |= {f"{quantity}.{name}": row for name, row in rows.items()}
    return found


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
    counts = {"linears": f"{len(masks):,}", "weights": f"{weights:,}"}
    if masks.patterns.only is None:
        counts |= pattern_facts(masks)
    return flat | counts | ({"bits per weight": f"{bits(masks):.3f}"} if weights else {})


def bits(masks: MaskSet) -> float:
    """Bits of the mask file for each masked weight."""
    return 8 * masks.size / sum(math.prod(masks.shape(name)) for name in masks)


def _prior(config: Config, learned: MaskSet | None) -> MaskSet | None:
    """The prior of the learned mask; None where it is gone, or was made anew since."""
    name = config.learn.prior.mask
    try:
        masks = None if name is None else open_masks(name, config)
    except ArtifactError:  # the prior masks may have been deleted
        return None
    if masks is None or masks.lacks_weights:
        return None
    known = (learned.meta.get("data") or {}).get(PRIOR_SHA256) if learned is not None else None
    return None if known not in (None, masks.content_sha256) else masks
