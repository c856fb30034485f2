"""The verbs status and stop on a run folder of notes, with stand-ins for Slurm's commands."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.launch import slurm
from megamask.launch.launch_folder import Launch, next_folder
from megamask.liveness import start_of
from megamask.process.holder import Holder
from megamask.process.lock import locked
from tests.unit.launch.cluster import Cluster


def write_run(run_dir: Path, state: str, step: int = 40) -> None:
    """The files of a learning run that stands at ``step`` of 100, half a second a step."""
    (run_dir / "learn/snapshots" / f"step-{step:08d}").mkdir(parents=True)
    holder = Holder.this_process("megamask learn")
    heartbeat = {"state": state, "step": step, "steps": 100, "time": holder.since, "world": 2}
    (run_dir / "learn/heartbeat.json").write_text(json.dumps({**heartbeat, "holder": vars(holder)}))
    records = [
        {"kind": "train", "step": one, "seconds": 30 + one / 2} for one in range(1, step + 1)
    ]
    evaluation = {"kind": "evaluation", "step": step, "perplexity": {"code": 7.5, "prose": None}}
    lines = [*map(json.dumps, [*records, evaluation]), '{"kind": "train", "st']
    (run_dir / "learn/metrics.jsonl").write_text("\n".join(lines))


def status(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert main(["status", str(run_dir), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    assert main(["status", str(run_dir)]) == 0
    assert str(found["state"]) in capsys.readouterr().out
    return found


def test_status_reads_a_living_run(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(cluster.run_dir, "learning")
    with locked("megamask learn", [cluster.run_dir / "learn"]):
        facts = status(cluster.run_dir, capsys)
        assert (facts["state"], facts["alive"], facts["step"]) == ("learning", True, 40)
        assert (facts["seconds_per_step"], facts["seconds_left"]) == (0.5, 30)
        assert (facts["snapshot"], facts["perplexity"]) == (40, {"code": 7.5, "prose": None})
        os.utime(cluster.run_dir / "learn/heartbeat.json", (1, 1))
        assert status(cluster.run_dir, capsys)["state"] == "silent"
    assert status(cluster.run_dir, capsys)["state"] == "died"


@pytest.mark.parametrize("state", ["finished", "interrupted", "failed"])
def test_status_reads_how_a_run_ended(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    assert status(cluster.run_dir, capsys)["state"] == "not started"
    write_run(cluster.run_dir, state)
    facts = status(cluster.run_dir, capsys)
    assert (facts["state"], facts["alive"], facts["seconds_left"]) == (state, False, None)


def launched(run_dir: Path, verb: str, process: Holder | None = None) -> Path:
    """The folder of a job that was started; without a process, of the Slurm job 41."""
    (folder := next_folder(run_dir)).mkdir(parents=True)
    Launch(folder, verb, None if process else "41", process, "now").write()
    return folder


def test_status_of_a_job_that_waits(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest launch of learn decides, not the launch of another verb after it."""
    folder = launched(cluster.run_dir, "learn")
    (folder / "job.log").write_text("one\nerror: the last line\x1b[2J\n\n")
    cluster.queue("PENDING|BeginTime||2026-11-26T10:00:00")
    for _ in range(2):
        facts = status(cluster.run_dir, capsys)
        assert (facts["state"], facts["job"]) == ("waiting", "41")
        assert facts["last_words"] == "error: the last line\x1b[2J"
        launched(cluster.run_dir, "tokenize", Holder.this_process("torchrun"))
    assert main(["status", str(cluster.run_dir)]) == 0
    assert "the last line\\x1b[2J\n" in capsys.readouterr().out  # does not clear the terminal


def test_status_of_a_run_that_learns_beside_another_verbs_job(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(cluster.run_dir, "tokenize")
    cluster.queue("PENDING|BeginTime||N/A")
    facts = status(cluster.run_dir, capsys)
    assert (facts["state"], facts["job"], facts["log"]) == ("not started", None, None)


def test_a_queue_that_does_not_answer_is_no_empty_queue(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(cluster.run_dir, "tokenize")
    launched(cluster.run_dir, "learn")
    (cluster.folder / "down").touch()
    said = "Slurm job 41: may wait or not: squeue failed (squeue: error: Unable to contact slurm"
    stop, run_status = ["stop", str(cluster.run_dir)], ["status", str(cluster.run_dir)]
    assert (main(stop), main(run_status), cluster.submit()) == (2, 2, 2)
    assert capsys.readouterr().err.count(said) == 3 and not cluster.calls
    with locked("megamask learn", [cluster.run_dir / "learn"]):  # a run that is seen is told of
        assert main(run_status) == 0
    (cluster.folder / "bin/squeue").write_text("#!/usr/bin/env bash\nexec sleep 30\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "TIMEOUT", 0.2)
        assert main(stop) == 2
    assert "the command squeue: gave no answer within 0.2 seconds" in capsys.readouterr().err


def test_stop_leaves_strangers_alone(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number in an old note is another process's by now."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        here = replace(Holder.this_process("torchrun"), pid=child.pid)
        launched(cluster.run_dir, "tokenize", here)  # the start is this process's
        launched(cluster.run_dir, "learn", replace(here, start=""))
        launched(cluster.run_dir, "learn", replace(here, pid=-1, start=""))
        assert main(["stop", str(cluster.run_dir)]) == 2
        assert "nothing runs on it" in capsys.readouterr().err and child.poll() is None
        launched(cluster.run_dir, "tokenize", replace(here, start=start_of(child.pid)))
        with monkeypatch.context() as patch:  # it is another user's
            patch.setattr(os, "kill", not_allowed)
            assert main(["stop", str(cluster.run_dir)]) == 2
        assert "cannot be told to end (Operation not permitted). Ask" in capsys.readouterr().err
        assert main(["stop", str(cluster.run_dir)]) == 0
        assert child.wait(10) == -signal.SIGTERM
    finally:
        child.kill()
        child.wait()


def not_allowed(*_: int) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_resumed_run_starts_until_its_own_heartbeat_is_there(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(cluster.run_dir, "failed")
    path = cluster.run_dir / "learn/heartbeat.json"
    value = json.loads(path.read_text())
    value["holder"]["pid"] += 1  # of the life before
    path.write_text(json.dumps(value))
    os.utime(path, (1, 1))
    with locked("megamask learn", [cluster.run_dir / "learn"]):
        facts = status(cluster.run_dir, capsys)
    assert (facts["state"], facts["seconds_since_sign_of_life"]) == ("starting", None)
    assert status(cluster.run_dir, capsys)["state"] == "failed"


def test_status_waits_for_no_pipe(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    folder = launched(cluster.run_dir, "learn")
    (cluster.run_dir / "learn").mkdir()
    for path in (folder / "job.log", *("learn/metrics.jsonl", "learn/heartbeat.json")):
        os.mkfifo(cluster.run_dir / path)
    assert status(cluster.run_dir, capsys)["state"] == "not started"


def test_status_and_stop_of_no_run(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("status", "stop"):
        assert main([verb, "no/such"]) == 2
        assert "no/such: is no run folder" in capsys.readouterr().err
    assert main(["stop", str(cluster.run_dir)]) == 2
    assert "nothing runs on it" in capsys.readouterr().err


def test_stop_asks_a_living_run_and_forbids_its_job_to_come_back(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = next_folder(cluster.run_dir)
    folder.mkdir(parents=True)
    Launch(folder, "learn", "41", None, "now").write()
    cluster.queue("RUNNING|None|n[1-2]|2026-11-26T10:00:00")
    (cluster.run_dir / "learn").mkdir()
    with locked("megamask learn", [cluster.run_dir / "learn"]):
        assert main(["stop", str(cluster.run_dir)]) == 0
    assert cluster.calls == ["scontrol update JobId=41 Requeue=0"]
    assert (cluster.run_dir / "learn/STOP").exists()
    assert "saves after its step and ends" in capsys.readouterr().out


def test_stop_ends_a_job_that_has_nothing_to_save(cluster: Cluster) -> None:
    assert cluster.submit() == 0
    cluster.queue("PENDING|BeginTime||N/A")
    assert main(["stop", str(cluster.run_dir)]) == 0
    assert cluster.calls[1:] == ["scancel 41"]
    cluster.queue("RUNNING|None|n1|N/A")
    assert main(["stop", str(cluster.run_dir)]) == 0
    told = ["scontrol update JobId=41 Requeue=0", "scancel --signal=TERM 41"]
    assert cluster.calls[2:] == told
    cluster.queue("SUSPENDED|None|n1|N/A")  # its processes wait with what they have not saved
    assert main(["stop", str(cluster.run_dir)]) == 0
    assert cluster.calls[4:] == told
    assert not (cluster.run_dir / "learn/STOP").exists()
