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
from tests.e2e.program import Finished, Program
from tests.slurm.lab import Lab

pytestmark = pytest.mark.slurm
Settings = Callable[[Path], list[str]]
# The first life learns at most 45 s, at two steps a second on the slow network.
STEPS = 120
RUN = (
    f"learn.steps={STEPS}",
    "learn.snapshot.every=5",
    "learn.monitor.evaluate_every=0",
    "learn.sampling.backend=torch",  # kernels are compiled anew for each copy of the code
)


def submit(lab: Lab, *words: str) -> Finished:
    launch = ("device=cpu", "nodes=2", "time=60", "launch.warning=60")
    with Program("submit", *words, *launch, host=lab.controller) as program:
        return program.wait()


def status(lab: Lab, run_dir: Path) -> dict[str, Any]:
    words = ("status", str(run_dir), "--json")
    done = lab.run(sys.executable, "-m", "megamask", *words, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def step(run_dir: Path) -> int:
    """The last step that the run wrote down."""
    path = run_dir / "learn/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def end_soon(lab: Lab, job: str) -> None:
    """Set a time limit whose warning comes as soon as Slurm looks at limits again.

    It looks every 30 s, and warns if less than the launch's 60 s of warning are left at its next
    look. A limit is a number of whole minutes since the start, and must not be over at this look.
    """
    hours, minutes, seconds = map(int, lab.fact(job, "RunTime").split(":"))
    ran = 3600 * hours + 60 * minutes + seconds
    limit = (ran + 90) // 60
    assert ran + 30 < 60 * limit <= ran + 90
    done = lab.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    assert done.returncode == 0, done.stderr


def start_now(lab: Lab, job: str, *changes: str) -> None:
    """Shorten the two minutes for which Slurm holds a job that is queued again.

    A node refuses a job whose credential was made in the second in which its last life ended, and
    Slurm then takes the job for dead.
    """
    time.sleep(1.5)
    done = lab.run("scontrol", "update", f"JobId={job}", "StartTime=now", *changes)
    assert done.returncode == 0, done.stderr


def test_a_job_survives_its_time_limit_and_the_death_of_a_node(
    lab: Lab, run_dir: Path, settings: Settings
) -> None:
    """Two nodes whose names do not resolve, one replica on each. The learned masks are those of a
    run of one process that nothing disturbed, bit for bit.
    """
    words = [*settings(run_dir), *RUN]
    quiet = Path(shutil.copytree(run_dir, run_dir.parent / "quiet"))
    lab.slow_down("n2")
    first = submit(lab, *words)
    assert first.code == 0, first.stderr
    job = status(lab, run_dir)["job"]
    log = run_dir / "launch/001/job.log"
    lab.watched += [log, log.with_name("rank-1.log")]

    def logged(text: str) -> bool:
        return log.exists() and text in log.read_text()

    lab.wait(lambda: step(run_dir) >= 6, "steps and a snapshot")
    # Another process learns the same undisturbed, while this one waits for Slurm.
    undisturbed = ["learn", *settings(quiet), *RUN, "parallel.threads=1"]
    undisturbed.append("learn.snapshot.every=1000")
    with Program(*undisturbed, host=lab.controller) as alone:
        again = submit(lab, *words)
        assert again.code == 2 and "is being written by megamask learn" in again.stderr
        assert f"job {job}" in again.stderr

        end_soon(lab, job)
        lab.wait(lambda: logged("queueing job"), "a snapshot at the time limit")
        assert logged("SIGUSR1: saved at step"), log.read_text()
        lab.wait(lambda: lab.state(job) == "PENDING", "the job in the queue again")
        assert status(lab, run_dir)["state"] in ("waiting", "interrupted")
        start_now(lab, job, "TimeLimit=60")
        saved = step(run_dir)
        lab.wait(lambda: step(run_dir) >= saved + 3, "steps of the second life")

        # the death of a node, and its return
        lab.kill_node("n2")
        lab.wait(lambda: lab.state(job) == "PENDING", "the job in the queue again", 150)
        lab.start_node("n2")
        idle = "idle 2\n"
        lab.wait(lambda: lab.run("sinfo", "-h", "-o", "%t %D").stdout == idle, "both nodes", 90)
        start_now(lab, job)
        lab.wait(lambda: lab.state(job) == "COMPLETED", "the end of the run", 150)
        quiet_end = alone.wait()
        assert quiet_end.code == 0, quiet_end.stderr

    found, expected = (
        load_masks(folder / "masks/learned.safetensors") for folder in (run_dir, quiet)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    facts = status(lab, run_dir)
    assert (facts["step"], facts["alive"], facts["queue"]) == (STEPS, False, None)
    # a busy machine may let rank 0 say that it waits for rank 1
    told = [line for line in log.read_text().splitlines() if "rank 1" in line]
    assert all("waiting for rank 1 of 2 to start" in line for line in told)
    assert (run_dir / "launch/001/rank-1.log").exists()
