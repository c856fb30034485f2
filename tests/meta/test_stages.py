"""What the quickstart asks between its stages: what is done, with which settings, how long it took."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "configs" / "recipes" / "quickstart.yaml"


def ask(run_dir: Path, *command: str, settings: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    arguments = [*command, "--config", str(RECIPE), f"run_dir={run_dir}", *settings]
    return subprocess.run([sys.executable, str(REPO / "launch" / "stages.py"), *arguments], capture_output=True, text=True, timeout=60)


def touch(path: Path, age: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (1e9 - age, 1e9 - age))


def test_a_stage_is_done_when_every_artefact_is_there(tmp_path: Path) -> None:
    assert ask(tmp_path, "is-done", "gguf").returncode == 1
    (tmp_path / "hf").mkdir()
    assert ask(tmp_path, "is-done", "gguf").returncode == 0
    touch(tmp_path / "masks" / "magnitude.safetensors")
    assert ask(tmp_path, "is-done", "prune").returncode == 1  # one of several masks
    assert ask(tmp_path, "is-done", "prune", settings=("prune.methods=[magnitude]",)).returncode == 0
    assert ask(tmp_path, "is-done", "report").returncode == 1  # it prints the table each time


def test_results_older_than_the_learned_mask_are_made_again(tmp_path: Path) -> None:
    touch(tmp_path / "results.json", age=10)
    touch(tmp_path / "masks" / "learned.safetensors")
    assert ask(tmp_path, "is-done", "evaluate").returncode == 1
    touch(tmp_path / "results.json", age=-10)
    assert ask(tmp_path, "is-done", "evaluate").returncode == 0


def test_a_folder_made_with_other_settings_is_refused(tmp_path: Path) -> None:
    assert ask(tmp_path, "check", settings=("learn.steps=5",)).returncode == 0
    refused = ask(tmp_path, "check", settings=("learn.steps=6",))
    assert refused.returncode == 2 and "learn.steps = 6" in refused.stderr and "RUN_DIR=" in refused.stderr
    assert ask(tmp_path, "check", settings=("learn.steps=5", "parallel.tp=3", "device=cpu")).returncode == 0  # the same artefacts


def test_another_protocol_keeps_the_masks_and_evaluates_again(tmp_path: Path) -> None:
    assert ask(tmp_path, "check").returncode == 0
    touch(tmp_path / "results.json")
    assert ask(tmp_path, "check").returncode == 0 and (tmp_path / "results.json").exists()
    assert ask(tmp_path, "check", settings=("evaluate.window=256",)).returncode == 0
    assert not (tmp_path / "results.json").exists() and (tmp_path / "results.previous.json").exists()


def test_a_moved_folder_is_the_same_run(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert ask(old, "check", settings=(f"model.gguf={old}/cache/a.gguf",)).returncode == 0
    old.rename(new)
    assert ask(new, "check", settings=(f"model.gguf={new}/cache/a.gguf",)).returncode == 0


def test_seconds_are_merged_and_interrupted_attempts_count(tmp_path: Path) -> None:
    for stage, seconds, code in (("prune", 10, 0), ("learn", 20, 75), ("learn", 30, 75), ("learn", 5, 0)):
        assert ask(tmp_path, "record", stage, str(seconds), str(code)).returncode == 0
    assert json.loads((tmp_path / "stages.json").read_text()) == {"prune": 10, "learn": 55}


def test_the_stages_are_verbs() -> None:
    from megamask.__main__ import VERBS
    from megamask.config import load_config, run_paths

    spec = importlib.util.spec_from_file_location("stages", REPO / "launch" / "stages.py")
    assert spec is not None and spec.loader is not None
    stages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stages)
    config = load_config(RECIPE)
    script = (REPO / "launch" / "quickstart.sh").read_text()
    named = [line.split()[1] for line in script.splitlines() if line.startswith("stage ")]
    assert named == ["gguf", "convert", "tokenize", "prune", "learn", "export", "evaluate", "report"] and set(named) <= set(VERBS)
    assert all(stages.artefacts(stage, config, run_paths(config)) for stage in named if stage != "report")
