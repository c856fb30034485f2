"""The verb status: where a learning run stands, read from its folder and from Slurm's queue."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from megamask.config import Config, RunPaths, run_paths
from megamask.errors import ArtifactError
from megamask.launch import slurm
from megamask.launch.launch_folder import launches
from megamask.learn.heartbeat import NAME, Heartbeat
from megamask.masks.snapshot_steps import snapshot_steps
from megamask.process.lock import writer_of
from megamask.terminal import duration, tell
from megamask.verbs.own_arguments import StatusArguments

SILENCE = 300.0  # seconds; a run that says nothing for longer, and for ten steps, is called silent
WINDOW = 20  # steps that the pace is measured over
Facts = dict[str, Any]


def run(config: Config, arguments: StatusArguments) -> None:
    """Print the status, as lines or as JSON.

    Raises:
        ArtifactError: there is no run folder, or no run is seen and Slurm's queue does not answer.
    """
    paths = paths_of(config)
    facts = status(paths)
    tell(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines_of(facts)))


def paths_of(config: Config) -> RunPaths:
    """The paths of the run.

    Raises:
        ArtifactError: there is no such folder.
    """
    paths = run_paths(config)
    if not paths.run_dir.is_dir():
        raise ArtifactError(paths.run_dir, "is no run folder", "Name one: megamask status RUN.")
    return paths


def status(paths: RunPaths) -> Facts:
    """The facts of a learning run; what is not known is None. Launches of other verbs do not count.

    state is that of the heartbeat, or: ``waiting`` in the queue, ``silent`` alive without a sign of
    life, ``died`` without a word, ``not started``.
    """
    heartbeat, holder = Heartbeat.read(paths.learn), writer_of(paths.learn)
    # While a resumed run loads its model, the heartbeat is that of its former life.
    is_former = bool(heartbeat and holder and not heartbeat.holder.is_process_of(holder))
    records = read_records(paths.learn / "metrics.jsonl")
    steps = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    pace = pace_of(steps)
    step = heartbeat.step if heartbeat else steps[-1]["step"] if steps else 0
    total = heartbeat.steps if heartbeat else None
    age = _age(paths.learn / NAME) if heartbeat and not is_former else None
    started = [one for one in launches(paths.run_dir) if one.verb == "learn"]
    job = started[-1].job if started else None
    if holder and holder.job:
        job = holder.job
    queued = _queued(job, is_alive=holder is not None) if job else None
    launch = started[-1].folder if started else None
    perplexity = evaluations[-1].get("perplexity") if evaluations else None
    is_on = holder is not None and total is not None and pace is not None
    return {
        "run": str(paths.run_dir),
        "state": _state(None if is_former else heartbeat, holder is not None, age, pace, queued),
        "alive": holder is not None,
        "step": step,
        "steps": total,
        "seconds_per_step": pace,
        "seconds_left": (total - step) * pace if is_on and total and pace else None,
        "seconds_since_sign_of_life": age,
        "perplexity": perplexity if isinstance(perplexity, dict) else None,
        "perplexity_step": evaluations[-1].get("step") if evaluations else None,
        "snapshot": next(iter(reversed(snapshot_steps(paths.learn / "snapshots"))), None),
        "process": str(holder) if holder else None,
        "launch_alive": bool(queued or started and started[-1].is_running()),
        "job": job,
        "queue": str(queued) if queued else None,
        "log": str(launch / "job.log") if launch else None,
        "last_words": last_words(launch / "job.log") if launch and not holder else None,
    }


def learning_state(paths: RunPaths) -> str:
    """The state of a learning run in words, without a question to Slurm's queue: ``finished``, or
    how far it came. Empty where nothing was learned.
    """
    heartbeat, holder = Heartbeat.read(paths.learn), writer_of(paths.learn)
    if heartbeat is None and holder is None:
        return ""
    age = _age(paths.learn / NAME) if heartbeat else None
    state = _state(heartbeat, holder is not None, age, None, None)
    if heartbeat is None or state == "finished":
        return state
    return f"{state} at step {heartbeat.step:,} of {heartbeat.steps:,}"


def _queued(job: str, is_alive: bool) -> slurm.QueuedJob | None:
    """The job in the queue. A queue that does not answer matters only where no run is seen."""
    try:
        return slurm.find_job(job)
    except ArtifactError:
        if is_alive:
            return None
        raise


def _state(
    heartbeat: Heartbeat | None,
    is_alive: bool,
    age: float | None,
    pace: float | None,
    queued: slurm.QueuedJob | None,
) -> str:
    if is_alive:
        is_silent = age is not None and age > max(SILENCE, 10 * (pace or 0.0))
        return "silent" if is_silent else heartbeat.state if heartbeat else "starting"
    if queued is not None:
        return "waiting" if queued.is_waiting else "starting"
    if heartbeat is None:
        return "not started"
    is_over = heartbeat.state in ("interrupted", "finished", "failed")
    return heartbeat.state if is_over else "died"


def lines_of(facts: Facts) -> list[str]:
    """The facts for people."""
    total = f" of {facts['steps']}" if facts["steps"] is not None else ""
    lines = [f"{facts['run']}: {facts['state']}, step {facts['step']}{total}"]

    def say(name: str, text: str) -> None:
        lines.append(f"  {name:<11} {text}")

    if facts["seconds_per_step"] is not None:
        left = facts["seconds_left"]
        rest = f", {duration(left)} left" if left is not None else ""
        say("pace", f"{facts['seconds_per_step']:.3g} seconds a step{rest}")
    if facts["perplexity"]:
        values = "  ".join(
            f"{name} {value:.2f}" if isinstance(value, int | float) else f"{name} not finite"
            for name, value in facts["perplexity"].items()
        )
        say("perplexity", f"{values} (held out, step {facts['perplexity_step']})")
    if facts["snapshot"] is not None:
        say("snapshot", f"step {facts['snapshot']}")
    if facts["alive"] and facts["seconds_since_sign_of_life"] is not None:
        say("last sign", f"{duration(facts['seconds_since_sign_of_life'])} ago")
    for key in ("process", "queue", "log"):
        if facts[key]:
            say(key, facts[key])
    if facts["last_words"]:
        say("last words", facts["last_words"])
    return lines


def read_records(path: Path) -> list[Facts]:
    """The records of a metrics file that is being written; a torn line is left out."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def pace_of(steps: list[Facts]) -> float | None:
    """Seconds a step over the last steps, evaluations and snapshots included."""
    last = [one for one in steps if isinstance(one.get("seconds"), int | float)][-WINDOW - 1 :]
    if len(last) < 2 or last[-1]["step"] <= last[0]["step"]:
        return None
    pace = (last[-1]["seconds"] - last[0]["seconds"]) / (last[-1]["step"] - last[0]["step"])
    return float(pace) if pace > 0 else None


def last_words(log: Path) -> str | None:
    """The last line of a log, which says how a job ended."""
    if not log.is_file():
        return None
    try:
        lines = log.read_bytes()[-4096:].decode(errors="replace").split("\n")
    except OSError:
        return None
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), None)


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
