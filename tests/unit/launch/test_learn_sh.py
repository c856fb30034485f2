"""What launch/learn.sh says, and how it calls torchrun, which is a stand-in here."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in for Python that prints its arguments and what it was told by the environment."""
    path = tmp_path / "python"
    path.write_text(
        "#!/usr/bin/env bash\n"
        'echo "$MEGAMASK_LAUNCH" >>"$(dirname "$0")/launches"\n'
        'echo "share=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-} $*" | tr "\\n" " "\n'
    )
    path.chmod(0o755)
    return path


def learn(python: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPO / "launch/learn.sh"), *words],
        env={**os.environ, "MEGAMASK_PYTHON": str(python), "NPROC_PER_NODE": "2", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("named", "processes"),
    [("0,1", 2), ("3", 1), ("GPU-a, GPU-b,GPU-c", 3), ("0,-1,1", 1), ("", 1), ("-1", 1)],
)
def test_a_process_for_each_gpu_that_is_visible(python: Path, named: str, processes: int) -> None:
    """More than the visible ones would share GPUs, which NCCL refuses."""
    smi = python.with_name("nvidia-smi")
    smi.write_text("#!/usr/bin/env bash\nfor i in 1 2 3 4 5 6 7 8; do echo GPU $i; done\n")
    smi.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    everything = {"NPROC_PER_NODE": "", "PATH": path}
    assert "--nproc-per-node 8 " in learn(python, "r.yaml", **everything).stdout
    visible = learn(python, "r.yaml", **everything, CUDA_VISIBLE_DEVICES=named)
    assert f"--nproc-per-node {processes} " in visible.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_one_node_needs_no_name_that_resolves(python: Path) -> None:
    done = learn(python, "my recipe.yaml", "learn.steps=3", VERB="prune")
    assert "share= -m torch.distributed.run --standalone --local-addr 127.0.0.1" in done.stdout
    assert "--nproc-per-node 2 --no-python bash -c" in done.stdout
    assert done.stdout.rstrip().endswith("megamask prune --config my recipe.yaml learn.steps=3")


def test_restarts_need_a_store_of_their_own(python: Path) -> None:
    """Without the variable, restarted processes on gloo find addresses of dead ones and hang."""
    assert "share=1" in (done := learn(python, "r.yaml", RESTARTS="2")).stdout
    assert "--max-restarts 2" in done.stdout


def test_each_start_of_torchrun_has_a_name_of_its_own(python: Path) -> None:
    """By that name learn knows a restart, which must not start over, from a new start."""
    learn(python, "r.yaml", MEGAMASK_LAUNCH="inherited")
    learn(python, "r.yaml", MEGAMASK_LAUNCH="inherited")
    names = python.with_name("launches").read_text().split()
    assert len(names) == len(set(names)) == 2 and "inherited" not in names


def nodes(rank: int, port: int, host: str = "127.0.0.1") -> dict[str, str]:
    return {
        "NNODES": "2",
        "NODE_RANK": str(rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "MASTER_WAIT": "1",
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_does_not_resolve_is_one_message(python: Path, rank: int) -> None:
    done = learn(python, "r.yaml", **nodes(rank, 29500, "no-such-node.invalid"))
    assert done.returncode == 2 and not done.stdout
    assert "MASTER_ADDR=no-such-node.invalid does not resolve" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_first_node_refuses_a_port_that_is_taken(python: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = learn(python, "r.yaml", **nodes(0, port))
        assert done.returncode == 2 and f"port {port} of 127.0.0.1 is taken" in done.stderr
        joined = learn(python, "r.yaml", **nodes(1, port))
    assert joined.returncode == 0 and f"--master-port {port}" in joined.stdout


def test_another_node_waits_for_the_first_and_says_what_is_missing(python: Path) -> None:
    port = free_port()
    done = learn(python, "r.yaml", **nodes(1, port, "127.0.0.77"))  # an address without a name
    assert done.returncode == 2
    assert f"node 1 waits for 127.0.0.77:{port}, node 0 (at most 1 s)" in done.stdout
    assert "did not answer" in done.stderr and "NODE_RANK=0" in done.stderr


def test_torchrun_passes_sigusr1_on(tmp_path: Path) -> None:
    """Slurm's warning, and what the head of learn.sh promises. Without it torchrun dies, and its
    processes go on without it. Real torchrun; the process writes down the signal that it gets.
    """
    worker, heard, ready = tmp_path / "worker.py", tmp_path / "heard", tmp_path / "ready"
    worker.write_text(
        "import pathlib, signal, sys, time\n"
        "def told(number, frame):\n"
        f"    pathlib.Path({str(heard)!r}).write_text(signal.Signals(number).name)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, told); signal.signal(signal.SIGTERM, told)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "MEGAMASK_CODE": str(worker), "NPROC_PER_NODE": "1"}
    environment["MEGAMASK_PYTHON"] = sys.executable
    command = ["bash", str(REPO / "launch/learn.sh"), "r.yaml"]
    with subprocess.Popen(command, env=environment, start_new_session=True) as torchrun:
        try:
            until(ready.exists, 60)
            torchrun.send_signal(signal.SIGUSR1)
            torchrun.wait(60)
            until(heard.exists, 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(torchrun.pid, signal.SIGKILL)
    assert heard.read_text() == "SIGUSR1" and torchrun.returncode == 1


def until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_a_recipe_the_use_is_shown(python: Path) -> None:
    done = learn(python)
    assert done.returncode == 2 and "./launch/learn.sh RECIPE" in done.stderr
