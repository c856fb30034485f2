"""The verb submit. Slurm's commands are stand-ins that write down what they are told; tests/slurm
and tests/e2e/test_submit.py start real jobs.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.config import load_config
from megamask.errors import ConfigError
from megamask.launch import slurm
from megamask.launch.job_script import Job
from megamask.launch.launch_folder import Launch, fill, launches, next_folder
from megamask.process.lock import locked
from tests.unit.launch.cluster import Cluster


def test_a_job_is_written_whole_and_submitted(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["time=90", "--nodes", "2", 'launch.setup=echo "it\'s" set', "parallel.tp=2"]
    assert cluster.submit(*words, "launch.sbatch=[--mem=0]") == 0, capsys.readouterr().err
    folder = cluster.run_dir / "launch/001"
    assert cluster.calls == [f"sbatch --parsable {folder}/submit.sbatch"]
    assert "Slurm job 41" in capsys.readouterr().out
    header = [
        line.removeprefix("#SBATCH ")
        for line in (folder / "submit.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    assert set(header) >= {
        *("--job-name=megamask-run_50_", "--nodes=2", "--ntasks-per-node=2", "--time=90"),
        *("--signal=USR1@300", "--open-mode=append", "--requeue", "--mem=0"),
        f'--output="{cluster.folder}/run 50%%/launch/001/job.log"',
        f'--chdir="{cluster.folder}"',
    }
    assert not any("gpus" in line for line in header)  # device=cpu
    given = load_config(None, [f"run_dir={cluster.run_dir}", "device=cpu", "parallel.tp=2"])
    written = load_config(folder / "recipe.yaml")
    assert written.model_copy(update={"launch": given.launch}) == given
    assert written.launch.nodes == 2 and written.launch.setup == 'echo "it\'s" set'
    for name in ("code/megamask/learn/loop.py", "code/launch/learn.sbatch", "code/launch/env.sh"):
        assert (folder / name).is_file()
    facts = (folder / "env.txt").read_text()
    assert f"megamask {__import__('megamask').__version__}, commit " in facts
    assert "package torch==" in facts
    note = Launch.read(folder)
    assert note is not None and (note.job, note.verb, note.process) == ("41", "tokenize", None)


def test_the_copy_runs_by_itself_and_knows_its_commit(cluster: Cluster) -> None:
    """Neither the folder that the job starts in nor PYTHONPATH decides which code runs."""
    assert cluster.submit() == 0
    code = cluster.run_dir / "launch/001/code"
    lines = ("def run(config, arguments):", "    import megamask", "    print(megamask.__file__)")
    (code / "megamask/verbs/settings.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, str(code), "settings"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(code / "megamask/__init__.py"), done.stderr
    assert (code / "COMMIT").read_text().strip() in (
        cluster.run_dir / "launch/001/env.txt"
    ).read_text()


def test_a_dry_run_prints_the_script_and_writes_nothing(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.submit("--dry-run") == 0
    said = capsys.readouterr().out
    assert "#SBATCH --nodes=1" in said and "# not started: sbatch" in said
    assert not cluster.calls and not (cluster.run_dir / "launch").exists()


def test_a_refusal_of_slurm_is_one_message_and_leaves_no_job(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster.folder / "refuse").touch()
    assert cluster.submit("--account", "nobody") == 2
    assert "was refused (sbatch: error: invalid account)" in capsys.readouterr().err
    assert launches(cluster.run_dir) == [] and not (cluster.run_dir / "launch").exists()
    (cluster.folder / "refuse").unlink()
    assert cluster.submit() == 0
    (cluster.folder / "refuse").touch()
    assert cluster.submit() == 2
    assert [one.name for one in (cluster.run_dir / "launch").iterdir()] == ["001"]
    assert [launch.folder.name for launch in launches(cluster.run_dir)] == ["001"]


def test_the_folder_of_a_job_that_may_wait_stays(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job of a submission that timed out can be in the queue, and needs its folder."""
    sbatch = cluster.folder / "bin" / "sbatch"
    sbatch.write_text(
        "#!/usr/bin/env bash\n"
        "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1\n"
    )
    assert cluster.submit() == 2
    assert "may be in the queue or not: sbatch failed" in capsys.readouterr().err
    assert (cluster.run_dir / "launch" / "001" / "submit.sbatch").exists()
    sbatch.write_text("#!/usr/bin/env bash\nexec sleep 60\n")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.2)
    assert cluster.submit() == 2
    assert "sbatch: gave no answer within 0.2 seconds" in capsys.readouterr().err
    assert (cluster.run_dir / "launch" / "002" / "submit.sbatch").exists()


def test_a_run_in_the_queue_or_in_use_is_refused(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.submit() == 0
    cluster.queue("PENDING|Priority||N/A")
    assert cluster.submit() == 2
    said = capsys.readouterr().err
    assert "waits for Slurm job 41, PENDING (Priority)" in said and "megamask stop" in said
    cluster.queue("")
    with locked("megamask tokenize", [cluster.run_dir / "shards"]):
        assert cluster.submit() == 2
        assert "shards: is being written by megamask tokenize" in capsys.readouterr().err
    assert cluster.submit() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.tp=4", "launch.processes_per_node=3"], "is a multiple of parallel.tp=4"),
        (["launch.launcher=torchrun", "launch.nodes=2"], "torchrun starts here alone"),
        (["launch.launcher=torchrun", "launch.container=x"], "launch.container = 'x': needs Slurm"),
        (["launch.account=a b"], "launch.account = 'a b': Value error, a name without blanks"),
        (["launch.time=2h"], "minutes, minutes:seconds"),
        (['launch.setup="a\\nb"'], "one line of text"),
        (["nodes=0"], "launch.nodes = 0"),
        (["--dry_run"], "option = '--dry_run'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cluster.submit(*words) == 2
    assert said in capsys.readouterr().err
    assert not cluster.calls and not (cluster.run_dir / "launch").exists()


def test_learn_is_checked_as_learn_itself_would(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", f"run_dir={cluster.run_dir}", "learn.global_batch=3"]) == 2
    assert "learn.global_batch" in capsys.readouterr().err
    assert not cluster.calls


def script_environment(script: str) -> dict[str, str]:
    """What the exports of a job script leave, as bash reads them."""
    exports = "\n".join(
        line for line in script.splitlines() if line.startswith(("export", "unset"))
    )
    leaked = {name: "leaked" for name in ("SETUP", "VENV", "CONTAINER", "MASTER_PORT")}
    done = subprocess.run(
        ["bash", "-c", f"{exports}\nenv -0"],
        env={"PATH": os.environ["PATH"], **leaked},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(one.split("=", 1) for one in done.stdout.split("\0") if one)


def test_variables_arrive_to_the_letter_and_none_leaks(tmp_path: Path) -> None:
    setup = 'module load cuda && echo "$HOME\'s" `x` # \\'
    values = {"setup": setup, "container": "img:1", "mounts": ["/a:/b"], "retries": 0}
    config = load_config(None, [f"launch={json.dumps(values)}"])
    job = Job(config, "learn", tmp_path / "run/launch/001", tmp_path / "cwd")
    found = script_environment(job.slurm_script())
    assert found["SETUP"] == setup and found["CONTAINER"] == "img:1" and found["RETRIES"] == "0"
    assert found["MOUNTS"] == f"{tmp_path}/cwd:{tmp_path}/cwd,{tmp_path}/run:{tmp_path}/run,/a:/b"
    assert not {"VENV", "MASTER_PORT", "MEGAMASK_PYTHON"} & set(found)
    plain = Job(load_config(), "learn", tmp_path / "run/launch/001", tmp_path / "cwd")
    found = script_environment(plain.torchrun_script())
    assert not {"SETUP", "CONTAINER"} & set(found) and found["MEGAMASK_PYTHON"] == sys.executable
    subprocess.run(["bash", "-n", "-c", plain.torchrun_script()], check=True)
    assert plain.torchrun_script().splitlines()[-1] == (
        f"exec bash {shlex.quote(str(plain.folder / 'code/launch/learn.sh'))} "
        f"{plain.folder / 'recipe.yaml'}"
    )


def test_notes_that_are_no_notes_are_passed_over(tmp_path: Path) -> None:
    for number, text in enumerate(["", "[]", "{}", '{"verb": 1, "time": "x", "job": "1"}'], 1):
        (folder := tmp_path / f"launch/{number:03d}").mkdir(parents=True)
        (folder / "job.json").write_text(text)
    assert launches(tmp_path) == [] and next_folder(tmp_path).name == "005"


def test_a_thousand_jobs_stay_in_order(tmp_path: Path) -> None:
    for number in ("002", "999", "1000"):
        (tmp_path / "launch" / number).mkdir(parents=True)
    assert next_folder(tmp_path).name == "1001"


def test_the_recipe_of_a_job_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    for words in (
        ["learn.preset=maskllm", "learn.steps=7"],
        ["learn.method=maskpro", "learn.memory=lean", "pattern=4:8"],
        ["learn.preset=best", "learn.distillation.share=0.5", "data.domains.a={kind: stdlib}"],
    ):
        config = load_config(None, words)
        fill(folder := tmp_path / words[0], config, "run.sh", "")
        assert load_config(folder / "recipe.yaml") == config


def test_without_sbatch_slurm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm.has_slurm() and slurm.find_job("1") is None
    with pytest.raises(ConfigError, match=r"needs the command sbatch\. Submit on a login node"):
        slurm.submit(tmp_path / "x")
