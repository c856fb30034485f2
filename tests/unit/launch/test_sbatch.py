"""What launch/learn.sbatch makes of its tasks' exit codes. ``srun``, ``scontrol`` and the program
are stand-ins here: the script's decisions are the subject.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamask.safe_checkpoint import NOTE
from megamask.verbs.table import VERBS

REPO = Path(__file__).resolve().parents[3]

# srun runs its command once for each task and returns the highest code, as the real one does.
SRUN = r"""
echo "$@" >>"$FAKE_FOLDER/sruns"
while [[ "$1" == -* ]]; do shift; done
if [ -n "$FAKE_DEAD_NODE" ]; then
    echo "srun: error: Task launch for StepId=7.0 failed on node $FAKE_DEAD_NODE: No route" >&2
    echo "srun: error: Application launch failed: No route" >&2
    exit 1
fi
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
    "show hostnames") tr , '\n' <<<"${3/node\[1-2\]/node1,node2}" ;;
    "show job") echo "JobId=7 Requeue=$FAKE_REQUEUE Restarts=0 ExcNodeList=(null) End=0" ;;
    "show node") echo "NodeName=node1 NodeAddr=127.0.0.9 NodeHostName=node1" ;;
    requeue*) echo requeued >>"$FAKE_FOLDER/requeues" ;;
    update*) echo "$3" >>"$FAKE_FOLDER/updates" ;;
esac
"""
# The names of the nodes resolve, unless a test says otherwise; addresses always do, but not the
# way back from an address to a name.
GETENT = r"""
[ "$1" = ahosts ] || exit 2
[[ "$2" == node* && -n "$FAKE_NO_NAMES" ]] && exit 2
echo "127.0.0.9 $2"
"""
# The program ends with its rank's code, and leaves a snapshot where it is told to.
PROGRAM = r"""
if [ "$1" = -c ]; then exec "$FAKE_PYTHON" "$@"; fi
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR" >>"$FAKE_FOLDER/tasks"
echo "the output of rank $RANK"
if [ -n "$FAKE_SIGNAL" ]; then kill -USR1 $PPID; kill -TERM $PPID; sleep 0.2; fi
if [ -n "$FAKE_START_OVER" ]; then
    mv "$FAKE_FOLDER/run/learn/snapshots" "$FAKE_FOLDER/run/learn/snapshots-before-1"
fi
if [ -n "$FAKE_SNAPSHOT" ]; then
    mkdir -p "$FAKE_FOLDER/run/learn/snapshots/$FAKE_SNAPSHOT"
    touch "$FAKE_FOLDER/run/learn/snapshots/$FAKE_SNAPSHOT/megamask.json"
fi
read -r -a codes <<<"$FAKE_CODES"
exit "${codes[$RANK]}"
"""


@dataclass
class Job:
    """A job that can be started several times, as Slurm does after a requeue."""

    folder: Path

    def life(
        self,
        *codes: int,
        snapshot: str = "",
        layout: str = "2(x2)",
        **variables: str,
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
            "FAKE_START_OVER": "",
            "FAKE_REQUEUE": "1",
            "FAKE_NODES": "node1 node2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURMD_NODENAME": "n1",
            "MEGAMASK_LEARN": str(self.folder / "run/learn"),  # empty: the script reads the recipe
            **variables,
        }
        command = ["bash", str(REPO / "launch/learn.sbatch"), str(self.folder / "recipe.yaml")]
        log = self.folder / "errors"  # of all lives, as --open-mode=append leaves it
        size = log.stat().st_size if log.exists() else 0
        with log.open("a") as errors:
            done = subprocess.run(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=60,
                check=False,
            )
        done.stderr = log.read_text()[size:]
        return done

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
        ("getent", GETENT),
        ("sinfo", r'printf "%s\n" $FAKE_NODES'),
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
    done = job.life(0, 0, MEGAMASK_LEARN="")
    assert done.returncode == 2 and "learn.steps" in done.stderr
    assert not (job.folder / "tasks").exists()


def test_a_saved_run_is_queued_again(job: Job) -> None:
    saved = job.life(75, 75, 75, 75, snapshot="step-00000020", MEGAMASK_LEARN="")
    assert saved.returncode == 0 and "saved at step 20" in saved.stdout
    assert job.requeues == 1


@pytest.mark.parametrize("code", [129, 130, 138, 143])
def test_a_signal_before_there_is_anything_to_save_is_no_failure(job: Job, code: int) -> None:
    done = job.life(code, 75)
    assert done.returncode == 0 and job.requeues == 1 and "failed" not in done.stdout


def test_the_shell_around_a_task_outlives_the_signal_that_python_answers(job: Job) -> None:
    """Slurm signals every process of a step. A dead shell would end the task before the save."""
    done = job.life(75, FAKE_SIGNAL="1", snapshot="step-00000020")
    assert "saved at step 20" in done.stdout and job.requeues == 1


def test_a_signal_before_python_ends_the_task_without_python(job: Job) -> None:
    """``megamask stop`` says that the job ends; it went on learning for its whole time."""
    line = 'if [ -n "${RANK:-}${SLURM_PROCID:-}" ]; then kill -TERM $$; sleep 0.1; fi'
    done = job.life(0, 0, SETUP=line)
    assert done.returncode == 0 and "stopped by a signal" in done.stdout and job.requeues == 1
    assert not (job.folder / "tasks").exists()  # what Python would write


def test_a_failure_beside_saved_ranks_is_a_failure(job: Job) -> None:
    done = job.life(75, 1, 75, 75, snapshot="step-00000020")
    assert "failed with code 200" in done.stdout and "saved at" not in done.stdout
    assert "rank 1 on n1 ended with code 1" in rank_log(job, 1)
    assert job.requeues == 1  # there is a new snapshot to go on from


@pytest.mark.parametrize("code", [75, 1])
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


@pytest.mark.parametrize("step", [300, 2000])
def test_a_life_that_starts_over_counts_its_own_snapshots(job: Job, step: int) -> None:
    """learn.resume=false puts the snapshots of the run before aside, whose steps may be higher."""
    old = job.folder / "run/learn/snapshots/step-00002000"
    old.mkdir(parents=True)
    (old / NOTE).write_text("{}")
    os.utime(old / NOTE, (1e9, 1e9))
    done = job.life(75, snapshot=f"step-{step:08d}", FAKE_START_OVER="1", RETRIES="0")
    assert done.returncode == 0 and f"saved at step {step}; queueing" in done.stdout
    done = job.life(75, FAKE_START_OVER="", RETRIES="0")  # this life saved nothing
    assert done.returncode == 1 and "no new snapshot" in done.stderr


def test_snapshots_that_are_put_aside_are_none_of_the_new_run(job: Job) -> None:
    (job.folder / "run/learn/snapshots/step-00002000").mkdir(parents=True)
    done = job.life(75, FAKE_START_OVER="1", RETRIES="0")
    assert done.returncode == 1 and "no new snapshot" in done.stderr


def test_lives_are_those_of_one_job_and_end_with_its_success(job: Job) -> None:
    spare = {"FAKE_NODES": "n1 n2 n3"}
    for _ in range(3):
        assert job.life(1, **spare).returncode == 0
    (job.folder / "updates").unlink()  # n1 was left out
    other = job.life(1, SLURM_JOB_ID="8", **spare)  # with lives, and a failed node, of its own
    assert other.returncode == 0 and not (job.folder / "updates").exists()
    for _ in range(2):
        assert job.life(1, SLURM_JOB_ID="8").returncode == 0
    assert job.life(0, SLURM_JOB_ID="8").returncode == 0
    for _ in range(3):  # somebody queues the job that ended again
        assert job.life(1, SLURM_JOB_ID="8").returncode == 0
    assert job.life(1, SLURM_JOB_ID="8").returncode == 1
    assert job.life(1, SLURM_JOB_ID="8").returncode == 0


def test_another_verb_saves_nothing_and_counts_its_own_lives(job: Job) -> None:
    """Also where a learning run writes snapshots meanwhile."""
    for life in range(3):
        done = job.life(138, 138, VERB="prune", snapshot=f"step-{life + 1:08d}")
        assert done.returncode == 0 and "stopped by a signal; queueing job 7" in done.stdout
    last = job.life(138, 138, VERB="prune")
    assert last.returncode == 1 and "no end of prune in 4 lives" in last.stderr
    assert job.requeues == 3
    for _ in range(3):
        assert job.life(75, 75).returncode == 0
    assert "no new snapshot in 4 lives" in job.life(75, 75).stderr


def test_a_signal_before_the_first_snapshot_is_not_called_a_save(job: Job) -> None:
    assert "stopped by a signal; queueing" in job.life(75, 75).stdout


def test_all_lives_of_a_job_have_one_name(job: Job) -> None:
    """By that name learn knows that an earlier life has put the snapshots before aside."""
    line = 'echo "$MEGAMASK_LAUNCH" >>"$FAKE_FOLDER/names"'
    for number, life in (("7", "0"), ("7", "1"), ("8", "0")):
        job.life(75, SLURM_JOB_ID=number, SLURM_RESTART_COUNT=life, SETUP=line)
    names = (job.folder / "names").read_text().split()
    assert len(names) == 6 and len(set(names[:4])) == 1 and len(set(names)) == 2


@pytest.mark.parametrize("verb", VERBS["submit"].fields[0].metadata["choices"])
def test_ranks_that_work_together_end_together(job: Job, verb: str) -> None:
    """Without scancel in the image, srun ends the tasks that wait for a failed task. Rank 0 of a
    verb of one rank may work for hours after the others have left.
    """
    assert job.life(0, VERB=verb).returncode == 0
    wait = "600" if VERBS[verb].is_parallel else "0"
    assert f"--wait={wait} " in (job.folder / "sruns").read_text()


def test_a_job_that_is_not_to_be_queued_again_is_not(job: Job) -> None:
    assert job.life(75, 75, snapshot="step-00000020", FAKE_REQUEUE="0").returncode == 0
    assert job.life(1, 1, FAKE_REQUEUE="0").returncode == 1
    assert job.requeues == 0


def test_tasks_get_what_torchrun_would_set(job: Job) -> None:
    job.life(0, 0, 0, layout="2,1")
    tasks = sorted((job.folder / "tasks").read_text().splitlines())
    assert tasks == ["0 3 0 2 node1", "1 3 1 2 node1", "2 3 0 1 node1"]


def test_each_rank_has_a_log_of_its_own(job: Job) -> None:
    done = job.life(0, 0)
    assert "the output of rank 0" in done.stdout and "rank 1" not in done.stdout
    assert "the output of rank 1" in rank_log(job, 1)


def test_logs_go_where_submit_wants_them(job: Job) -> None:
    job.life(0, 0, MEGAMASK_LOGS=str(job.folder / "launch/001"))
    assert "the output of rank 1" in (job.folder / "launch/001/rank-1.log").read_text()


def test_a_node_whose_name_does_not_resolve_is_reached_by_its_address(job: Job) -> None:
    job.life(0, FAKE_NO_NAMES="1")
    assert (job.folder / "tasks").read_text().split()[-1] == "127.0.0.9"


def test_a_task_that_cannot_find_the_first_node_says_so_at_once(job: Job) -> None:
    done = job.life(0, MASTER_ADDR="node9", FAKE_NO_NAMES="1")
    assert "error: n1 cannot resolve node9, the first node" in done.stderr
    assert not (job.folder / "tasks").exists()


def test_a_busy_port_is_passed_over(job: Job) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = job.life(0, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert f"port {port} of 127.0.0.1 is busy" in done.stdout and done.returncode == 0


def test_a_port_lies_below_those_that_the_system_hands_out(job: Job) -> None:
    for number in (1, 7, 99_999_999):
        job.life(0, SLURM_JOB_ID=str(number), SETUP='echo "$MASTER_PORT" >>"$FAKE_FOLDER/ports"')
    ports = [int(word) for word in (job.folder / "ports").read_text().split()]
    assert len(ports) >= 3 and all(20_000 <= port < 32_000 for port in ports)


def test_each_task_runs_the_line_of_setup(job: Job) -> None:
    """Also a line that reads variables that are not set, as those of modules and conda do."""
    line = 'echo "$NOT_SET${RANK:-} from ${SLURM_PROCID:-the script}" >>"$FAKE_FOLDER/setup"'
    job.life(0, 0, SETUP=line)
    said = (job.folder / "setup").read_text().splitlines()
    assert said == [" from the script", " from 0", " from 1"]


def test_a_container_is_handed_to_every_srun(job: Job) -> None:
    """The recipe too is read inside: the host may have no megamask."""
    image = {"CONTAINER": "/images/mega mask.sqsh", "MOUNTS": "/data:/data"}
    assert job.life(0, 0, MEGAMASK_LEARN="", **image).returncode == 0
    calls = [line for line in (job.folder / "sruns").read_text().splitlines() if "--export" in line]
    reading, learning = calls
    assert "-N1 -n1" in reading and "python -c" in reading
    for call in (reading, learning):
        assert "--container-image=/images/mega mask.sqsh" in call
        assert "--container-mounts=/data:/data" in call


def test_cores_and_options_reach_srun(job: Job) -> None:
    job.life(0, SLURM_CPUS_PER_TASK="6", SRUN="--cpu-bind=cores --mpi=none")
    call = (job.folder / "sruns").read_text()
    assert "--export=ALL --cpus-per-task=6 " in call and "--cpu-bind=cores --mpi=none bash" in call


def test_a_node_that_fails_first_twice_in_a_row_is_left_out(job: Job) -> None:
    spare = {"FAKE_NODES": "n1 n2 n3"}
    job.life(0, 1, SLURMD_NODENAME="n2", **spare)
    job.life(0, 1, SLURMD_NODENAME="n1", SLURM_RESTART_COUNT="1", **spare)
    assert not (job.folder / "updates").exists()  # each failed once
    done = job.life(1, 1, SLURMD_NODENAME="n1", SLURM_RESTART_COUNT="2", **spare)
    assert (job.folder / "updates").read_text() == "ExcNodeList=n1\n"
    assert "n1 failed first twice in a row" in done.stdout and job.requeues == 3


def test_a_rank_that_waited_in_vain_blames_no_node(job: Job) -> None:
    """In a hang all ranks end with 69 at about one time, most of them on nodes that are well."""
    for life in ("0", "1"):
        job.life(69, 69, SLURM_RESTART_COUNT=life, FAKE_NODES="n1 n2 n3")
    assert not (job.folder / "updates").exists() and job.requeues == 2


def test_a_node_that_starts_no_task_is_left_out_too(job: Job) -> None:
    """srun alone speaks of such a node: no task wrote its name down."""
    spare = {"FAKE_NODES": "n1 n2 n3", "RETRIES": "9"}
    job.life(0, FAKE_DEAD_NODE="n2", **spare)
    job.life(0, 1, SLURM_RESTART_COUNT="1", **spare)  # the words of the life before do not count
    job.life(0, FAKE_DEAD_NODE="n2", SLURM_RESTART_COUNT="2", **spare)
    assert not (job.folder / "updates").exists()
    done = job.life(0, FAKE_DEAD_NODE="n2", SLURM_RESTART_COUNT="3", **spare)
    assert "n2 failed first twice in a row" in done.stdout
    assert (job.folder / "updates").read_text() == "ExcNodeList=n2\n"


def test_a_node_that_the_job_needs_is_not_left_out(job: Job) -> None:
    for life in ("0", "1"):
        job.life(1, SLURM_RESTART_COUNT=life, FAKE_NODES="n1 n2")
    assert not (job.folder / "updates").exists() and job.requeues == 2


def rank_log(job: Job, rank: int) -> str:
    return (job.folder / f"run/learn/logs/7.0/rank-{rank}.log").read_text()
