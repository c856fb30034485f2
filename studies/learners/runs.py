"""Runs of ``studies.learners.__main__``: where each lies, how its verbs are started, what it leaves
behind.

    OUT/base.json                          the recipe's settings but for ``learn``
    OUT/oneshot/PATTERN-HASH/              one-shot masks, shared by all arms of a pattern
    OUT/runs/ARM-HASH/SEED/                a run directory of megamask; learned.json after
    ``learn``, result.json after ``evaluate``
    OUT/times/ARM-HASH.json                seconds of a step, measured apart (``--time``)

HASH is of the settings that decide what is learned, without the seed: other settings are another
run, equal settings of two arms are one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from megamask.config import Config, load_config
from megamask.errors import ArtifactError
from megamask.learn.metrics.provenance import versions
from megamask.masks.file import load_masks
from megamask.report.reading import Record, read_metrics
from megamask.storage import read_json, write_json
from studies.learners.arms import ONESHOT, Arm, Settings
from studies.learners.child import AGAIN, link, locked, verb

CURVE_WINDOWS = (
    12  # held-out windows a domain while learning; the final masks are evaluated on more
)
FREE = (
    "seed",
    "run_dir",
    "parallel",
    "device",
    "evaluate",
    "learn.snapshot",
    "learn.monitor",
    "learn.resume",
)


@dataclass(frozen=True)
class Budget:
    """What every arm may spend."""

    steps: int
    micro_batch: int
    global_batch: int
    evaluate_every: int
    evaluate_tokens: int
    minutes: float  # of one verb

    def rates(self, share: float = 1.0) -> Settings:
        """The learning rate: close to the default for the budget's steps, but the same whatever an
        arm does to the prior.
        """
        highest = float(f"{share * 2e-3 * math.sqrt(60 / self.steps):.3g}")
        return {"optimizer.lr": highest, "optimizer.min_lr": highest / 10}

    def settings(self, share_of_steps: float = 1.0) -> Settings:
        """As settings of megamask."""
        return {
            "steps": max(1, round(self.steps * share_of_steps)),
            "micro_batch": self.micro_batch,
            "global_batch": self.global_batch,
            "snapshot.every": max(1, min(100, self.steps // 3)),
            "snapshot.keep": 1,
            "monitor.evaluate_every": self.evaluate_every,
            "monitor.evaluate_windows": CURVE_WINDOWS,
            "evaluate.max_tokens": self.evaluate_tokens,
            "monitor.sinks": [],
        }


@dataclass(frozen=True)
class Bench:
    """The folders, and the settings that all arms share.

    Args:
        out: where everything is written.
        base: a run directory with ``weights`` and ``shards``; ``hf`` and one-shot masks are reused
            if they are there.
        budget: steps and batch.
        extra: ``key=value`` for every arm; an arm's own settings win.
    """

    out: Path
    base: Path
    budget: Budget
    extra: tuple[str, ...] = ()

    @property
    def recipe(self) -> Path:
        """The settings that are not about learning."""
        return self.out / "base.json"

    def prepare(self, recipe: Path) -> None:
        """Check the base and write ``base.json``.

        Raises:
            MegamaskError: a recipe that cannot be read, a base run that is not prepared.
        """
        for name in ("weights", "shards"):
            if not (self.base / name).is_dir():
                raise ArtifactError(
                    self.base / name,
                    "is missing",
                    "Name a prepared run with --base: ./launch/quickstart.sh makes one.",
                )
        settings = load_config(recipe).model_dump(mode="json", exclude_unset=True)
        write_json(
            self.recipe,
            {key: value for key, value in settings.items() if key not in ("run_dir", "learn")},
        )

    def overrides(self, arm: Arm, run_dir: Path, seed: int) -> list[str]:
        """Everything that makes the recipe this arm."""
        common = {
            **(arm.common or {}),
            **(self.budget.rates() if arm.common else {}),
            **self.budget.settings(arm.share_of_steps),
        }
        own = {**arm.settings, **(self.budget.rates(arm.rate) if arm.rate != 1 else {})}
        words = [
            f"pattern={arm.pattern}",
            *map(_word, common.items()),
            *self.extra,
            *map(_word, own.items()),
        ]
        return [*words, f"seed={seed}", f"run_dir={run_dir}"]

    def config(self, arm: Arm, run_dir: Path = Path("runs/arm"), seed: int = 0) -> Config:
        """The settings of an arm, checked.

        Raises:
            ConfigError: one that does not exist or cannot work.
        """
        return load_config(self.recipe, self.overrides(arm, run_dir, seed))

    def digest(self, arm: Arm) -> str:
        """Hash of the settings that were given and decide what is learned, and of the model."""
        given = self._given(arm)
        if not arm.learns:
            given.pop("learn", None)
        return self._hash(given)

    def _given(self, arm: Arm) -> Record:
        """What was given, rather than left at its default: a setting that is new in the tree
        changes no hash.
        """
        given: Record = self.config(arm).model_dump(mode="json", exclude_unset=True)
        for key in FREE:
            section, _, name = key.partition(".")
            (given.get(section, {}) if name else given).pop(name or section, None)
        return given

    def _hash(self, given: Record) -> str:
        model = read_json(self.base / "weights" / "megamask.json", "Run the verb convert.")[
            "fingerprint"
        ]
        return hashlib.sha256(json.dumps([model, given], sort_keys=True).encode()).hexdigest()[:10]

    def folder(self, arm: Arm) -> Path:
        """Where the seeds of an arm lie; an arm with equal settings may have made it."""
        digest = self.digest(arm)
        return next(
            iter(sorted((self.out / "runs").glob(f"*-{digest}"))),
            self.out / "runs" / f"{arm.name}-{digest}",
        )

    def oneshot(self, arm: Arm) -> Path:
        """Run directory of the one-shot masks of an arm's pattern."""
        given = self._given(arm)
        given.pop("learn", None)
        return self.out / "oneshot" / f"{arm.pattern.replace(':', 'of')}-{self._hash(given)}"

    def verb(self, name: str, overrides: list[str], run_dir: Path, lock: int) -> None:
        """Run a verb of megamask to its end.

        Raises:
            ArmError: it failed, or was not done in time.
        """
        verb(name, self.recipe, overrides, run_dir, self.budget.minutes, lock)

    def results(self, arm: Arm) -> list[Record]:
        """What is known of an arm, a seed each."""
        paths = (
            sorted(self.folder(arm).glob("*/result.json"))
            if arm.learns
            else [self.oneshot(arm) / "result.json"]
        )
        known = [read_json(path, f"Delete it. {AGAIN}") for path in paths if path.exists()]
        return [
            result
            for result in known
            if result["protocol"] == self.protocol(arm) and result["digest"] == self.digest(arm)
        ]

    def is_done(self, arm: Arm, seed: int) -> bool:
        """Whether this seed has its result."""
        return any(not arm.learns or result["seed"] == seed for result in self.results(arm))

    def protocol(self, arm: Arm) -> Record:
        """How the final masks are evaluated; another one evaluates again, without learning
        again.
        """
        section = self.config(arm).evaluate
        return {"window": section.window, "max_tokens": section.max_tokens, "bos": section.bos}


def run_arm(bench: Bench, arm: Arm, seed: int) -> None:
    """Everything that an arm and a seed still lack.

    Raises:
        ArmError: a verb failed or took too long.
    """
    if not arm.learns:
        run_oneshot(bench, arm)
        return
    run_dir = bench.folder(arm) / str(seed)
    link_base(bench.base, run_dir)
    with locked(run_dir) as lock:
        overrides = bench.overrides(arm, run_dir, seed)
        link_prior(bench, arm, run_dir)
        if not (run_dir / "learned.json").exists():
            bench.verb("learn", overrides, run_dir, lock)
            write_json(run_dir / "learned.json", learned(run_dir, arm))
            shutil.rmtree(run_dir / "learn" / "snapshots", ignore_errors=True)
        mask = run_dir / "masks" / "learned.safetensors"
        bench.verb("evaluate", [*overrides, f"evaluate.masks={{learned: {mask}}}"], run_dir, lock)
        write_result(bench, arm, seed, run_dir, read_json(run_dir / "learned.json", AGAIN))


def run_oneshot(bench: Bench, arm: Arm) -> None:
    """All one-shot masks of a pattern, and their perplexities."""
    run_dir = oneshot_masks(bench, arm, ONESHOT)
    with locked(run_dir) as lock:
        masks = ", ".join(
            f"{method}: {run_dir / 'masks' / method}.safetensors" for method in ONESHOT
        )
        bench.verb(
            "evaluate",
            [*bench.overrides(arm, run_dir, 0), f"evaluate.masks={{{masks}}}"],
            run_dir,
            lock,
        )
        write_result(
            bench,
            arm,
            0,
            run_dir,
            {"seconds": read_json(run_dir / "results.json", AGAIN)["seconds"]},
        )


def oneshot_masks(bench: Bench, arm: Arm, methods: Sequence[str]) -> Path:
    """A run directory with the masks of these methods: those of the base where they fit, others
    made by ``prune``, once.
    """
    run_dir = bench.oneshot(arm)
    vouched = run_dir / "pruned.json"
    if vouched.exists() and set(methods) <= set(read_json(vouched, AGAIN)):
        return run_dir  # while another process may be evaluating them
    link_base(bench.base, run_dir)
    with locked(run_dir, wait=True) as lock:
        known = read_json(vouched, AGAIN) if vouched.exists() else []
        missing = [method for method in methods if method not in known]
        for path in (bench.base / "masks" / f"{method}.safetensors" for method in missing):
            if path.exists() and str(load_masks(path).pattern) == arm.pattern:
                link(path, run_dir / "masks" / path.name)
                if path.stem == "sparsegpt_update":
                    link(
                        bench.base / "weights-sparsegpt_update",
                        run_dir / "weights-sparsegpt_update",
                    )
        if (
            missing
        ):  # prune looks at what is linked too, and makes it again if it was made in another way
            settings = [
                word for word in bench.overrides(arm, run_dir, 0) if not word.startswith("learn.")
            ]
            bench.verb("prune", [*settings, f"prune.methods=[{', '.join(missing)}]"], run_dir, lock)
            write_json(vouched, [*known, *missing])
    return run_dir


def link_prior(bench: Bench, arm: Arm, run_dir: Path) -> None:
    """Put the prior mask where the arm looks for it."""
    if arm.prior is not None:
        name = f"{arm.prior}.safetensors"
        link(oneshot_masks(bench, arm, [arm.prior]) / "masks" / name, run_dir / "masks" / name)


def time_arm(bench: Bench, arm: Arm, steps: int) -> None:
    """Seconds of a step, from a few steps in a folder of their own; for a machine that has nothing
    else to do.
    """
    run_dir = bench.out / "times" / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    link_base(bench.base, run_dir)
    with locked(run_dir) as lock:
        link_prior(bench, arm, run_dir)
        few = [
            f"learn.steps={steps}",
            "learn.monitor.evaluate_every=0",
            "learn.monitor.evaluate_windows=1",
        ]
        bench.verb("learn", [*bench.overrides(arm, run_dir, 0), *few], run_dir, lock)
    write_json(bench.out / "times" / f"{bench.folder(arm).name}.json", learned(run_dir, arm))
    shutil.rmtree(run_dir)


def link_base(base: Path, run_dir: Path) -> None:
    """A run directory that reads the weights and shards of ``base``, and writes nothing there."""
    for name in ("weights", "hf"):
        if (base / name).is_dir():
            link(base / name, run_dir / name)
    for domain in (base / "shards").iterdir():
        if domain.name != "cache":
            link(domain, run_dir / "shards" / domain.name)


def learned(run_dir: Path, arm: Arm) -> Record:
    """What a learning run says of itself: curve, seconds of a step, memory, how far it went from
    its prior.
    """
    records = sorted(
        read_metrics(run_dir / "learn" / "metrics.jsonl"), key=lambda record: record["seconds"]
    )
    train = [record for record in records if record["kind"] == "train"]
    keys = ("step", "tokens", "seconds", "perplexity")
    seconds = [
        new["seconds"] - old["seconds"]
        for old, new in zip(records, records[1:], strict=False)
        if new["kind"] == "train"
    ]
    load = os.getloadavg()[0]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "curve": [
            {key: record[key] for key in keys}
            for record in records
            if record["kind"] == "evaluation"
        ],
        "tokens": train[-1]["tokens"],
        "steps": train[-1]["step"],
        "seconds_per_step": statistics.median(seconds),
        "peak_memory_gib": max(record["memory_gib"] for record in train),
        "changed": changed(run_dir, arm),
        "max_prob": train[-1].get("max_prob"),
        "grad_norm": statistics.fmean(record["grad_norm"] for record in train)
        if "grad_norm" in train[-1]
        else None,
        "load_average": round(load, 2),
        "contended": load > (os.cpu_count() or 1) + 0.5,
        "versions": versions(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "cores": os.cpu_count(),
    }


def changed(run_dir: Path, arm: Arm) -> float | None:
    """Share of all groups whose mask is not the prior's; None without a prior."""
    if arm.prior is None:
        return None
    masks = load_masks(run_dir / "masks" / "learned.safetensors")
    prior = load_masks(run_dir / "masks" / f"{arm.prior}.safetensors")
    moved = [masks.index(name) != prior.index(name) for name in masks]
    return sum(int(one.sum()) for one in moved) / sum(one.numel() for one in moved)


def write_result(bench: Bench, arm: Arm, seed: int, run_dir: Path, found: Record) -> None:
    """Put everything together as ``result.json``."""
    evaluated = read_json(run_dir / "results.json", AGAIN)
    facts = {
        "arm": arm.name,
        "seed": seed,
        "pattern": arm.pattern,
        "digest": bench.digest(arm),
        "protocol": bench.protocol(arm),
    }
    given = bench.config(arm, run_dir, seed).model_dump(mode="json", exclude_unset=True)["learn"]
    result = {
        **facts,
        **found,
        "perplexity": evaluated["perplexity"],
        "evaluation": evaluated["protocol"],
        "settings": given,
    }
    write_json(run_dir / "result.json", result)


def measured_times(bench: Bench, arm: Arm) -> Record:
    """What ``--time`` found for an arm; empty if it was not asked."""
    path = bench.out / "times" / f"{bench.folder(arm).name}.json"
    return dict(read_json(path, f"Delete it. {AGAIN}")) if path.exists() else {}


def _word(setting: tuple[str, Any]) -> str:
    key, value = setting
    section = "" if key.split(".")[0] in Config.model_fields else "learn."
    return f"{section}{key}={value if isinstance(value, str) else json.dumps(value)}"
