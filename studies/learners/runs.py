"""The runs of an arm: one-shot masks, learning, evaluation, and their results."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import psutil

from megamask.learn.metrics.provenance import versions
from megamask.masks.file import load_masks
from megamask.report.reading import Record, read_metrics
from megamask.storage import read_json, write_json
from studies.child import AGAIN, link, locked
from studies.learners.arm import Arm
from studies.learners.arms import ONESHOT
from studies.learners.bench import Bench

# What a row says of the updates, and its column.
UPDATES = {
    "signal_share": "signal",
    "below_epsilon": "below epsilon",
    "relative_step": "move / rate",
    "clip_factor": "clip factor",
}


def run_arm(bench: Bench, arm: Arm, seed: int) -> None:
    """Run the verbs whose results an arm and a seed do not have yet.

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
    """Make all one-shot masks of a pattern, and evaluate them."""
    run_dir = oneshot_masks(bench, arm, ONESHOT)
    folder = run_dir / "masks"
    masks = ", ".join(f"{method}: {folder / method}.safetensors" for method in ONESHOT)
    overrides = [*bench.overrides(arm, run_dir, 0), f"evaluate.masks={{{masks}}}"]
    with locked(run_dir) as lock:
        bench.verb("evaluate", overrides, run_dir, lock)
        seconds = read_json(run_dir / "results.json", AGAIN)["seconds"]
        write_result(bench, arm, 0, run_dir, {"seconds": seconds})


def oneshot_masks(bench: Bench, arm: Arm, methods: Sequence[str]) -> Path:
    """A run directory with the one-shot masks of ``methods``.

    Masks of the base run are linked where their pattern fits; the verb prune makes the others once.
    """
    run_dir = bench.oneshot(arm)
    vouched = run_dir / "pruned.json"
    if set(methods) <= set(vouched_methods(run_dir)):
        return run_dir  # without the lock, which a process that evaluates the masks may hold
    link_base(bench.base, run_dir)
    with locked(run_dir, wait=True) as lock:
        known = vouched_methods(run_dir)
        missing = [method for method in methods if method not in known]
        for path in (bench.base / "masks" / f"{method}.safetensors" for method in missing):
            if path.exists() and str(load_masks(path).pattern) == arm.pattern:
                for file in path.parent.glob(f"{path.stem}.*"):
                    link(file, run_dir / "masks" / file.name)
                if path.stem == "sparsegpt_update":
                    link(
                        bench.base / "weights-sparsegpt_update",
                        run_dir / "weights-sparsegpt_update",
                    )
        # The verb prune also checks the linked masks, and makes those again that do not fit.
        if missing:
            settings = [
                word for word in bench.overrides(arm, run_dir, 0) if not word.startswith("learn.")
            ]
            bench.verb("prune", [*settings, f"prune.methods=[{', '.join(missing)}]"], run_dir, lock)
            write_json(vouched, [*known, *missing])
    return run_dir


def vouched_methods(run_dir: Path) -> list[str]:
    """The methods whose masks were made or checked here, and have their margins."""
    vouched = run_dir / "pruned.json"
    known = read_json(vouched, AGAIN) if vouched.exists() else []
    return [name for name in known if (run_dir / "masks" / f"{name}.margins").exists()]


def link_prior(bench: Bench, arm: Arm, run_dir: Path) -> None:
    """Link the prior mask of an arm, and its margins, into its run directory."""
    if arm.prior is not None:
        made = oneshot_masks(bench, arm, [arm.prior]) / "masks"
        for path in made.glob(f"{arm.prior}.*"):  # its margins too
            link(path, run_dir / "masks" / path.name)


def time_arm(bench: Bench, arm: Arm, steps: int) -> None:
    """Measure the seconds of a step with a few steps in a separate folder.

    The machine should have no other work.
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
    """Make a run directory that reads the weights and shards of ``base`` through links."""
    for name in ("weights", "hf"):
        if (base / name).is_dir():
            link(base / name, run_dir / name)
    for domain in (base / "shards").iterdir():
        if domain.name != "cache":
            link(domain, run_dir / "shards" / domain.name)


def learned(run_dir: Path, arm: Arm) -> Record:
    """The facts of a learning run: curve, seconds of a step, memory, difference from the prior."""
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
        **measured_updates(train),
        "load_average": round(load, 2),
        "contended": load > (os.cpu_count() or 1) + 0.5,
        "versions": versions(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "cores": os.cpu_count(),
    }


def measured_updates(train: Sequence[Record]) -> Record:
    """Means of what AdamW's updates were made of, over the steps that have been measured; empty
    where none was. See ``megamask.optim.update_measure``.
    """
    known = {key: [record[key] for record in train if key in record] for key in UPDATES}
    return {key: statistics.fmean(values) for key, values in known.items() if values}


def changed(run_dir: Path, arm: Arm) -> float | None:
    """Share of all groups whose mask differs from the prior mask; None without a prior."""
    if arm.prior is None:
        return None
    masks = load_masks(run_dir / "masks" / "learned.safetensors")
    prior = load_masks(run_dir / "masks" / f"{arm.prior}.safetensors")
    differ = [masks.index(name) != prior.index(name) for name in masks]
    return sum(int(groups.sum()) for groups in differ) / sum(groups.numel() for groups in differ)


def write_result(bench: Bench, arm: Arm, seed: int, run_dir: Path, measured: Record) -> None:
    """Write ``result.json`` from the measured facts and the results of the verb evaluate."""
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
        **measured,
        "perplexity": evaluated["perplexity"],
        "evaluation": evaluated["protocol"],
        "settings": given,
    }
    write_json(run_dir / "result.json", result)


def measured_times(bench: Bench, arm: Arm) -> Record:
    """The facts that ``--time`` measured for an arm; empty if there are none."""
    path = bench.out / "times" / f"{bench.folder(arm).name}.json"
    return dict(read_json(path, f"Delete it. {AGAIN}")) if path.exists() else {}
