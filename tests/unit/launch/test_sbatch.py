"""What launch/learn.sbatch makes of its tasks' exit codes. ``srun``, ``scontrol`` and the program
are stand-ins here: the script's decisions are the subject.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]

# srun runs its command once for each task and returns the highest code, as the real one does.
SRUN = r"""
while [[ "$1" == --* ]]; do shift; done
worst=0
for ((rank = 0; rank < FAKE_TASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_NTASKS=$FAKE_TASKS SLURM_LOCALID=$((rank % 2)) SLURM_STEP_ID=0 \
    SLURM_NODEID=$((rank / 2)) SLURM_STEP_TASKS_PER_NODE="$FAKE_LAYOUT" "$@" || code=$?
    ((${code:-0} > worst)) && worst=$code; code=0
done
exit $worst
"""
SCONTROL = r"""
case "$1 $2" in
    "show hostnames") printf 'node1\nnode2\n' ;;
    "show job") echo "JobId=7 Requeue=$FAKE_REQUEUE Restarts=0" ;;
    requeue*) echo requeued >>"$FAKE_FOLDER/requeues" ;;
esac
"""
# The program ends with its rank's code, and leaves a snapshot where it is told to.
PROGRAM = r"""
if [ "$1" = -c ]; then exec "$FAKE_PYTHON" "$@"; fi
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR" >>"$FAKE_FOLDER/tasks"
echo "the output of rank $RANK"
if [ -n "$FAKE_SNAPSHOT" ]; then mkdir -p "$FAKE_FOLDER/run/learn/snapshots/$FAKE_SNAPSHOT"; fi
read -r -a codes <<<"$FAKE_CODES"
exit "${codes[$RANK]}"
"""


@dataclass
class Job:
    """A job that can be started several times, as Slurm does after a requeue."""

    folder: Path

    def life(
        self, *codes: int, snapshot: str = "", may_requeue: bool = True, layout: str = "2(x2)"
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPO),
            "VENV": "/nowhere",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "FAKE_FOLDER": str(self.folder),
            "FAKE_PYTHON": sys.executable,
            "FAKE_TASKS": str(len(codes)),
            "FAKE_LAYOUT": layout,
            "FAKE_CODES": " ".join(map(str, codes)),
            "FAKE_SNAPSHOT": snapshot,
            "FAKE_REQUEUE": str(int(may_requeue)),
        }
        command = ["bash", str(REPO / "launch/learn.sbatch"), str(self.folder / "recipe.yaml")]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    @property
    def requeues(self) -> int:
        path = self.folder / "requeues"
        return len(path.read_text().split()) if path.exists() else 0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "bin").mkdir()
    for name, body in (
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("python", PROGRAM),
        ("scancel", ""),
    ):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)
    (tmp_path / "recipe.yaml").write_text(f"run_dir: {tmp_path / 'run'}\n")
    return Job(tmp_path)


def test_a_finished_run_ends_the_job(job: Job) -> None:
    assert job.life(0, 0, 0, 0).returncode == 0
    assert job.requeues == 0


def test_a_user_error_ends_the_job_with_its_code(job: Job) -> None:
    """Also where the other ranks were told to save: nothing gets better by starting again."""
    assert job.life(2, 2, 2, 2).returncode == 2
    assert job.life(75, 2, 75, 75).returncode == 2
    assert job.requeues == 0


def test_a_recipe_that_cannot_be_read_starts_no_task(job: Job) -> None:
    (job.folder / "recipe.yaml").write_text("learn: {stepz: 3}\n")
    done = job.life(0, 0)
    assert done.returncode == 2 and "learn.steps" in done.stderr
    assert not (job.folder / "tasks").exists()


def test_a_saved_run_is_queued_again(job: Job) -> None:
    assert job.life(75, 75, 75, 75, snapshot="step-00000020").returncode == 0
    assert job.requeues == 1


def test_a_failure_beside_saved_ranks_is_a_failure(job: Job) -> None:
    done = job.life(75, 1, 75, 75, snapshot="step-00000020")
    assert "failed with code 200" in done.stdout and "saved" not in done.stdout
    assert "rank 1 ended with code 1" in rank_log(job, 1)
    assert job.requeues == 1  # there is a new snapshot to go on from


@pytest.mark.parametrize("code", [75, 1, 138])
def test_lives_without_a_new_snapshot_end(job: Job, code: int) -> None:
    """Three are queued again, the fourth is not; a snapshot in between starts the count anew."""
    for _ in range(3):
        assert job.life(code, code).returncode == 0
    assert job.life(code, code, snapshot="step-00000004").returncode == 0
    for _ in range(3):
        assert job.life(code, code).returncode == 0
    done = job.life(code, code)
    assert done.returncode == 1 and "no new snapshot in 4 lives" in done.stderr
    assert job.requeues == 7


def test_a_job_that_is_not_to_be_queued_again_is_not(job: Job) -> None:
    assert job.life(75, 75, snapshot="step-00000020", may_requeue=False).returncode == 0
    assert job.life(1, 1, may_requeue=False).returncode == 1
    assert job.requeues == 0


def test_tasks_get_what_torchrun_would_set(job: Job) -> None:
    job.life(0, 0, 0, layout="2,1")
    tasks = sorted((job.folder / "tasks").read_text().splitlines())
    assert tasks == ["0 3 0 2 node1", "1 3 1 2 node1", "2 3 0 1 node1"]


def test_each_rank_has_a_log_of_its_own(job: Job) -> None:
    done = job.life(0, 0)
    assert "the output of rank 0" in done.stdout and "rank 1" not in done.stdout
    assert "the output of rank 1" in rank_log(job, 1)


def rank_log(job: Job, rank: int) -> str:
    return (job.folder / f"run/learn/logs/7.0/rank-{rank}.log").read_text()
