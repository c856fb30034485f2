"""The lease of a GPU: budget, limits, what is kept, and the wheels that travel."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import real_model
from benchmarks.gpu.lease import Lease, run_limited
from benchmarks.gpu.lease_parts import BY_NAME, PARTS, Part, Situation
from benchmarks.lab import read_config
from megamask.config.load import load_config
from megamask.errors import EXIT_USER_ERROR, ConfigError
from megamask.verbs.words import build_arguments, parse

REPO = Path(__file__).resolve().parents[3]
# Packages that a CUDA image of PyTorch brings, so that they do not travel.
IN_THE_IMAGE = {
    *("torch", "numpy", "safetensors", "transformers", "numba", "psutil", "pyyaml", "packaging"),
    *(
        "tokenizers",
        "huggingface-hub",
        "sentencepiece",
        "tensorboard",
        "matplotlib",
        "triton",
        "accelerate",
        "tqdm",
        "requests",
    ),
    # Assumed, not known: the part `kernels` runs tests. The playbook says so.
    *("pytest", "pytest-timeout", "pytest-xdist"),
}
NOT_NEEDED = {"wandb"}  # learn.monitor.sinks=[] leaves it out


def part(name: str, program: str, seconds: int = 1, limit: int = 20) -> Part:
    """A part that runs a Python program."""
    command = [sys.executable, "-c", program]
    return Part(name, "a test", seconds, limit, lambda here: command, writes_figures=False)


def lease(tmp_path: Path, seconds: float = 60) -> Lease:
    (tmp_path / "work").mkdir()
    return Lease(Situation("cpu", tmp_path / "work"), tmp_path / "out", seconds)


def test_a_failure_does_not_stop_the_parts_after_it(tmp_path: Path) -> None:
    here = lease(tmp_path)
    assert here.run([part("bad", "print('why'); raise SystemExit(3)"), part("good", "print(7)")])
    record = json.loads((tmp_path / "out/results.json").read_text())["parts"]
    assert record["bad"]["state"] == "failed with exit code 3"
    assert record["good"]["state"] == "ok"
    summary = (tmp_path / "out/summary.md").read_text()
    assert "why" in summary and "\n7\n" in summary and "toy size" in summary


def test_three_files_come_back_however_many_parts_ran(tmp_path: Path) -> None:
    lease(tmp_path).run([part(f"p{number}", f"print({number})") for number in range(4)])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"summary.md", "results.json", "logs.tar.gz"}
    with tarfile.open(tmp_path / "out/logs.tar.gz") as archive:
        assert archive.getnames() == ["p0.txt", "p1.txt", "p2.txt", "p3.txt"]


def test_a_part_that_no_longer_fits_is_left_out_and_a_shorter_part_runs(tmp_path: Path) -> None:
    here = lease(tmp_path, seconds=30)
    assert here.run([part("long", "print(1)", seconds=100), part("short", "print(2)")]) == 0
    states = {outcome.part.name: outcome.state for outcome in here.outcomes}
    assert states["long"].startswith("not run: ") and "takes 100" in states["long"]
    assert states["short"] == "ok"


def test_a_part_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    late = "import time; time.sleep(60)"
    program = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {late!r}, {str(tmp_path)!r}]);"
        "print('begun', flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    state, output = run_limited([sys.executable, "-c", program], 2)
    assert state == "ended after 2 s" and output == "begun\n"
    while running_with(tmp_path):  # the grandchild
        assert time.monotonic() - begin < 10
        time.sleep(0.02)


def running_with(path: Path) -> str:
    """The numbers of the processes whose command line names a path."""
    return subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True).stdout


def test_a_lease_that_is_cut_short_keeps_what_was_measured(tmp_path: Path) -> None:
    """SIGTERM to the shell script ends the running part and leaves the results of those before."""
    command = ["bash", str(REPO / "benchmarks/gpu.sh")]
    environment = {
        **{"DEVICE": "cpu", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
        **{"PARTS": "facts parity", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)},
    }
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("## parity"):
            break
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143
    record = json.loads((tmp_path / "out/results.json").read_text())["parts"]
    assert record["facts"]["state"] == "ok" and "parity" not in record
    assert running_with(tmp_path) == ""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_part_has_a_command_that_its_module_reads(device: str, tmp_path: Path) -> None:
    here = Situation(device, tmp_path, model=tmp_path)
    for one in PARTS:
        assert 0 < one.seconds < one.limit
        command = one.command(here)
        if command is None:
            assert device == "cpu"
            continue
        words = command[command.index("-m") + 1 :]
        if one.writes_figures:
            words = [*words, "--json", str(tmp_path / "figures.json")]
        read(*words)
    assert BY_NAME["real-model"].command(Situation(device, tmp_path)) is None


def read(module: str, *words: str) -> None:
    """Read the words as the module does; its own parser ends the process at a wrong word."""
    if module == "pytest":
        assert all((REPO / word).is_file() for word in words if word.endswith(".py"))
        return
    if module == "megamask":
        request = parse(words)
        load_config(None, request.overrides)
        build_arguments(request.verb, request.arguments)
        return
    program = importlib.import_module(module)
    if not words:
        assert callable(program.main)
        return
    options = program.read_options(list(words))
    if hasattr(options, "settings"):
        read_config(options)


def test_a_word_that_no_module_knows_is_seen() -> None:
    with pytest.raises(SystemExit):
        read("benchmarks.plan", "--device", "cuda", "--epochs", "3")
    with pytest.raises(ConfigError):
        read("benchmarks.plan", "--device", "cpu", "learn.memory=thin")


def test_the_verbs_of_the_real_model_leave_no_handlers(tmp_path: Path) -> None:
    """A handler that stays would print every line of the next verb twice."""
    logger = logging.getLogger("megamask")
    before = list(logger.handlers)
    words = ["--device", "cpu", "--model", str(tmp_path / "none"), "--steps", "1"]
    recipe = REPO / Situation.recipe
    code = real_model.main([*words, "--recipe", str(recipe), "--run-dir", str(tmp_path / "run")])
    assert code == EXIT_USER_ERROR
    assert logger.handlers == before


def test_a_lease_fits_the_parts_that_decide_most() -> None:
    """The parts up to the real model fit nine minutes, which leaves six for starting a machine."""
    most_valuable = PARTS[: [part.name for part in PARTS].index("real-model") + 1]
    assert sum(part.seconds for part in most_valuable) <= 540


def wheels() -> dict[str, str]:
    """Name -> version of what travels."""
    lines = (REPO / "benchmarks/gpu/wheels.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: version for name, version in pairs}


def test_wheels_are_the_pinned_versions() -> None:
    text = (REPO / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    for name, version in wheels().items():
        assert pinned.get(name, version) == version
    assert {"megatron-core", "pydantic", "gguf"} <= pinned.keys()


def test_wheels_bring_what_they_need_and_what_the_image_lacks() -> None:
    """pydantic takes one version of pydantic-core only, and pip resolves nothing on the way."""
    travelling = wheels()
    for name in ("pydantic", "gguf"):
        assert importlib.metadata.version(name) == travelling[name]
        for needed in importlib.metadata.requires(name) or []:
            if "extra ==" in needed:
                continue
            found = re.match(r"[A-Za-z0-9_.-]+", needed)
            assert found is not None
            assert found[0].lower() in travelling.keys() | IN_THE_IMAGE, needed
            if "==" in needed:
                assert travelling[found[0]] == needed.partition("==")[2].split(";")[0].strip()
    for needed in importlib.metadata.requires("megamask") or []:
        found = re.match(r"[A-Za-z0-9_.-]+", needed)
        assert found is not None
        if "extra ==" not in needed:
            assert found[0].lower() in travelling.keys() | IN_THE_IMAGE | NOT_NEEDED, needed
