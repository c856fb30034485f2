"""One learning run on two real Slurm nodes, through everything that may happen to it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.masks.file import load_masks
from tests.e2e.program import RECIPE, here
from tests.slurm.lab import Lab

pytestmark = pytest.mark.slurm
Settings = Callable[[Path], list[str]]
STEPS = 400
RUN = (f"learn.steps={STEPS}", "learn.snapshot.every=50", "learn.monitor.evaluate_every=0")


def megamask(lab: Lab, verb: str, *words: str) -> tuple[int, str]:
    done = lab.run(sys.executable, "-m", "megamask", verb, *words, PYTHONWARNINGS="ignore")
    return done.returncode, done.stdout + done.stderr


def status(lab: Lab, run_dir: Path) -> dict[str, Any]:
    code, said = megamask(lab, "status", str(run_dir), "--json")
    assert code == 0, said
    found: dict[str, Any] = json.loads(said)
    return found


def step(run_dir: Path) -> int:
    """The last step that the run wrote down."""
    path = run_dir / "learn/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def start_now(lab: Lab, job: int, *changes: str) -> None:
    """Shorten the two minutes for which Slurm holds a job that is queued again.

    A node refuses a job whose credential was made in the second in which its last life ended, and
    Slurm then takes the job for dead.
    """
    time.sleep(3)
    done = lab.run("scontrol", "update", f"JobId={job}", "StartTime=now", *changes)
    assert done.returncode == 0, done.stderr


def test_a_job_survives_its_time_limit_and_the_death_of_a_node(
    lab: Lab, run_dir: Path, settings: Settings
) -> None:
    """Two nodes whose names do not resolve, one replica on each. The learned masks are those of a
    run of one process that nothing disturbed, bit for bit.
    """
    words = ["--config", str(RECIPE), *settings(run_dir), *RUN]
    quiet = Path(shutil.copytree(run_dir, run_dir.parent / "quiet"))
    launch = ["device=cpu", "nodes=2", "time=60", "launch.warning=60"]
    lab.slow_down("n2")
    code, said = megamask(lab, "submit", *words, *launch)
    assert code == 0, said
    job = status(lab, run_dir)["job"]
    log = run_dir / "launch/001/job.log"
    lab.watched += [log, log.with_name("rank-1.log")]

    def logged(text: str) -> bool:
        return log.exists() and text in log.read_text()

    lab.wait(lambda: step(run_dir) >= 5, "the first steps")

    # a second submission
    code, said = megamask(lab, "submit", *words, *launch)
    assert code == 2 and "is being written by megamask learn" in said and f"job {job}" in said

    # the time limit: Slurm warns within half a minute
    assert lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=2").returncode == 0
    lab.wait(lambda: logged("queueing job"), "a snapshot at the time limit")
    assert logged("SIGUSR1: saved at step"), log.read_text()
    lab.wait(lambda: lab.state(job) == "PENDING", "the job in the queue again")
    assert status(lab, run_dir)["state"] in ("waiting", "interrupted")
    start_now(lab, job, "TimeLimit=60")
    saved = step(run_dir)
    lab.wait(lambda: step(run_dir) >= saved + 20, "steps of the second life")

    # the death of a node, and its return
    lab.kill_node("n2")
    lab.wait(lambda: lab.state(job) == "PENDING", "the job in the queue again", 150)
    lab.start_node("n2")
    lab.wait(
        lambda: lab.run("sinfo", "-h", "-o", "%t %D").stdout == "idle 2\n", "both nodes again", 90
    )
    start_now(lab, job)
    lab.wait(lambda: lab.state(job) == "COMPLETED", "the end of the run", 150)

    here("learn", *settings(quiet), *RUN, "parallel.threads=1")
    found, expected = (
        load_masks(folder / "masks/learned.safetensors") for folder in (run_dir, quiet)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    facts = status(lab, run_dir)
    assert (facts["step"], facts["alive"], facts["queue"]) == (STEPS, False, None)
    assert "rank 1" not in log.read_text() and (run_dir / "launch/001/rank-1.log").exists()
