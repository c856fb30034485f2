"""The runs of the study, and what is known of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from megamask.config import Config, load_config
from megamask.learn.metrics.provenance import versions
from megamask.optim.schedule import learning_rates
from megamask.report.reading import Record
from megamask.storage import read_json, write_json
from studies.child import AGAIN, link, locked, verb
from studies.evidence.job import Job
from studies.given import LEARNING, MAKING, MEASURING, deciding, text_digests

RESULT = "result.json"


@dataclass(frozen=True)
class Study:
    """What the command asks for.

    Attributes:
        base: a prepared run: ``hf``, ``weights`` and ``shards`` are read.
        out: where all runs go, as NAME-HASH[/SEED].
        recipe: the settings below those of the jobs.
        settings: words ``key=value`` for every job; those of a job win.
        minutes: the longest time of a verb.
    """

    base: Path
    out: Path
    recipe: Path
    settings: tuple[str, ...]
    minutes: float

    @cached_property
    def fingerprint(self) -> str:
        """Of the base model."""
        return str(read_json(self.base / "weights" / "megamask.json", AGAIN)["fingerprint"])

    @cached_property
    def text(self) -> dict[str, list[str]]:
        """Digests of the text, by domain."""
        return text_digests(self.base / "shards")

    def words(self, job: Job, seed: int) -> list[str]:
        """The settings of a job; later words win."""
        return [*self.settings, *job.settings, *([f"seed={seed}"] if job.is_seeded else [])]

    def config(self, job: Job) -> Config:
        """The settings of a job and of its verbs, with seed 0."""
        own = [word for _, words in job.verbs for word in words if "=" in word]
        return load_config(self.recipe, [*self.words(job, 0), *own])

    def digest(self, job: Job) -> str:
        """Hash of the model and of all that decides the results of a job, but for its seed."""
        config = self.config(job)
        verbs = [name for name, _ in job.verbs]
        learns = "learn" in verbs
        others = [name for name in ("recover", "sensitivity") if name in verbs]
        given = deciding(config, (*MAKING, *LEARNING * learns, *others, *MEASURING))
        rates = learning_rates(config) if learns else None  # derived, so they are not given
        masks = {name: self.digest(source) for name, source in job.masks.items()}
        model = self.digest(job.model) if job.model else None
        decides = [self.fingerprint, self.text, given, job.verbs, rates, masks, model]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]

    def folder(self, job: Job, seed: int) -> Path:
        """The run folder."""
        folder = self.out / f"{job.name}-{self.digest(job)}"
        return folder / str(seed) if job.is_seeded else folder

    def result(self, job: Job, seed: int) -> Record | None:
        """What a job found; None before its end."""
        path = self.folder(job, seed) / RESULT
        return dict(read_json(path, f"Delete it. {AGAIN}")) if path.exists() else None


def run_job(study: Study, job: Job, seed: int) -> None:
    """Run the sources of a job, then its verbs, unless it has its result. The verbs themselves
    judge what is done already.

    Raises:
        ArmError: a verb failed or took too long.
    """
    if study.result(job, seed) is not None:
        return
    for source in job.sources:
        run_job(study, source, seed)
    run_dir = study.folder(job, seed)
    link_inputs(study, job, seed, run_dir)
    with locked(run_dir, wait=True) as lock:
        if study.result(job, seed) is not None:  # another process was faster
            return
        print(f"{job.name} ...", flush=True)
        for name, more in job.verbs:
            own = [word.replace("{run}", str(run_dir)) for word in more]
            words = [*study.words(job, seed), *own, f"run_dir={run_dir}"]
            verb(name, study.recipe, words, run_dir, study.minutes, lock)
        write_json(run_dir / RESULT, found(study, job, seed, run_dir))
        # the largest part of a run, and nothing reads it any more
        shutil.rmtree(run_dir / "learn" / "snapshots", ignore_errors=True)


def link_inputs(study: Study, job: Job, seed: int, run_dir: Path) -> None:
    """Link model, text and masks into the run folder of a job."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if job.model:
        link(study.folder(job.model, seed) / "reordered", run_dir / "hf")
    else:
        for name in ("hf", "weights"):
            link(study.base / name, run_dir / name)
    for domain in (study.base / "shards").iterdir():
        if domain.name != "cache":
            link(domain, run_dir / "shards" / domain.name)
    for name, source in job.masks.items():
        for path in (study.folder(source, seed) / "masks").glob(f"{name}.*"):
            link(path, run_dir / "masks" / path.name)


def found(study: Study, job: Job, seed: int, run_dir: Path) -> dict[str, Any]:
    """The results of a job, for its table."""
    facts: dict[str, Any] = {
        "job": job.name,
        "digest": study.digest(job),
        "seed": seed if job.is_seeded else None,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(),
    }
    results, parts = run_dir / "results.json", run_dir / "sensitivity.json"
    if results.exists():
        read = read_json(results, AGAIN)
        facts |= {name: read[name] for name in ("perplexity", "protocol", "seconds")}
    if parts.exists():
        facts["sensitivity"] = read_json(parts, AGAIN)
    return facts
