"""What the quickstart asks between its stages: what is done, with which settings, how long it
took.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from megamask import pipeline as stages
from megamask.config import load_config, run_paths

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "configs" / "recipes" / "quickstart.yaml"


@dataclass
class Answer:
    returncode: int
    stderr: str


def words(run_dir: Path, *command: str, settings: tuple[str, ...] = ()) -> list[str]:
    return [*command, "--config", str(RECIPE), f"run_dir={run_dir}", *settings]


def ask(run_dir: Path, *command: str, settings: tuple[str, ...] = ()) -> Answer:
    said = io.StringIO()
    arguments = ["pipeline", *words(run_dir, *command, settings=settings)]
    with patch.object(sys, "argv", arguments), contextlib.redirect_stderr(said):
        return Answer(stages.main(), said.getvalue())


def touch(path: Path, age: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    os.utime(path, (1e9 - age, 1e9 - age))


def test_a_stage_is_done_when_every_artefact_is_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megamask.pipeline", *words(tmp_path, "is-done", "gguf")]
    assert subprocess.run(command, timeout=60).returncode == 1
    (tmp_path / "hf").mkdir()
    assert ask(tmp_path, "is-done", "gguf").returncode == 0
    touch(tmp_path / "masks" / "magnitude.safetensors")
    only = ("prune.methods=[magnitude]",)
    assert ask(tmp_path, "is-done", "prune", settings=only).returncode == 1  # without its margins
    touch(tmp_path / "masks" / "magnitude.margins")
    assert ask(tmp_path, "is-done", "prune").returncode == 1  # one of several masks
    assert ask(tmp_path, "is-done", "prune", settings=only).returncode == 0
    assert ask(tmp_path, "is-done", "report").returncode == 1  # it prints the table each time


def test_a_text_that_was_interrupted_is_not_done(tmp_path: Path) -> None:
    """The folder is made first, and the note of each domain last."""
    for name in ("code", "prose"):
        assert ask(tmp_path, "is-done", "tokenize").returncode == 1
        touch(tmp_path / "shards" / name / "train.bin")
        assert ask(tmp_path, "is-done", "tokenize").returncode == 1
        touch(tmp_path / "shards" / name / "meta.json")
    assert ask(tmp_path, "is-done", "tokenize").returncode == 0


def test_results_older_than_the_learned_mask_are_made_again(tmp_path: Path) -> None:
    touch(tmp_path / "results.json", age=10)
    touch(tmp_path / "masks" / "learned.safetensors")
    assert ask(tmp_path, "is-done", "evaluate").returncode == 1
    touch(tmp_path / "results.json", age=-10)
    assert ask(tmp_path, "is-done", "evaluate").returncode == 0


def test_results_older_than_a_one_shot_mask_are_made_again(tmp_path: Path) -> None:
    """As after another method was asked for: its row would be missing."""
    methods = ("prune.methods=[magnitude, ria]",)
    touch(tmp_path / "results.json")
    touch(tmp_path / "export", age=0)
    touch(tmp_path / "masks" / "magnitude.safetensors", age=10)
    assert ask(tmp_path, "is-done", "evaluate", settings=methods).returncode == 0
    touch(tmp_path / "masks" / "ria.safetensors", age=-10)
    assert ask(tmp_path, "is-done", "evaluate", settings=methods).returncode == 1
    assert ask(tmp_path, "is-done", "evaluate").returncode == 0  # not among these methods
    assert ask(tmp_path, "is-done", "export", settings=methods).returncode == 0


def test_what_was_made_with_other_settings_is_not_reused(tmp_path: Path) -> None:
    five, six = ("learn.steps=5",), ("learn.steps=6",)
    assert ask(tmp_path, "record", "learn", "1", "0", settings=five).returncode == 0
    assert (
        ask(tmp_path, "check", settings=six).returncode == 0
    )  # there is no learned mask to be mistaken for another
    touch(tmp_path / "masks" / "learned.safetensors")
    assert ask(tmp_path, "check", settings=six).returncode == 0
    assert ask(tmp_path, "is-done", "learn", settings=six).returncode == 1  # learning goes on
    assert ask(tmp_path, "is-done", "learn", settings=five).returncode == 0
    refused = ask(tmp_path, "check", settings=(*five, "seed=7"))
    assert refused.returncode == 2 and "seed = 7" in refused.stderr and "RUN_DIR=" in refused.stderr
    assert (
        ask(
            tmp_path, "check", settings=(*five, "parallel.tp=3", "device=cpu", "evaluate.window=64")
        ).returncode
        == 0
    )  # the same mask


def test_a_stage_that_failed_holds_no_settings(tmp_path: Path) -> None:
    """A wrong setting can be corrected and the script run again."""
    assert ask(tmp_path, "record", "prune", "1", "2", settings=("pattern=2:5",)).returncode == 0
    touch(tmp_path / "masks" / "magnitude.safetensors")
    assert ask(tmp_path, "check", settings=("prune.methods=[magnitude]",)).returncode == 0


def test_no_method_leaves_prune_out(tmp_path: Path) -> None:
    assert ask(tmp_path, "is-done", "prune", settings=("prune.methods=[]",)).returncode == 0
    assert ask(tmp_path, "is-done", "prune").returncode == 1
    assert ask(tmp_path, "is-done", "report").returncode == 1  # always runs


def test_another_protocol_evaluates_again(tmp_path: Path) -> None:
    touch(tmp_path / "results.json")
    assert ask(tmp_path, "record", "evaluate", "1", "0").returncode == 0
    assert ask(tmp_path, "is-done", "evaluate").returncode == 0
    assert ask(tmp_path, "is-done", "evaluate", settings=("evaluate.window=256",)).returncode == 1
    config = load_config(None, [f"run_dir={tmp_path}", "evaluate.protocol=wikitext2-2048"])
    assert run_paths(config).results == tmp_path / "results-wikitext2-2048.json"
    assert not stages.is_there("evaluate", config, run_paths(config))


def test_a_moved_folder_is_the_same_run(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "hf").mkdir(parents=True)
    assert (
        ask(
            old, "record", "gguf", "1", "0", settings=(f"model.gguf={old}/cache/a.gguf",)
        ).returncode
        == 0
    )
    old.rename(new)
    assert ask(new, "check", settings=(f"model.gguf={new}/cache/a.gguf",)).returncode == 0
    assert ask(new, "check", settings=("model.gguf=other.gguf",)).returncode == 2


def test_a_moved_model_with_an_ignored_key_is_the_same_model(tmp_path: Path) -> None:
    from megamask.config import load_config, run_paths
    from megamask.safe_checkpoint import NOTE
    from megamask.weights.base_model import BaseModel
    from tests.e2e.conftest import make_model

    model = make_model(tmp_path / "model", seed=0)
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "my_note": 3}))
    here = [f"run_dir={tmp_path}", "model.ignore_keys=[my_note]"]
    before = load_config(RECIPE, [*here, f"model.hf={model}"])
    paths = run_paths(before)
    paths.weights.mkdir(parents=True)
    (paths.weights / NOTE).write_text(
        json.dumps({"fingerprint": BaseModel(model, ignore_keys=["my_note"]).fingerprints().exact})
    )
    stages.record("convert", 1.0, 0, before, paths)
    now = load_config(RECIPE, [*here, f"model.hf={model.rename(tmp_path / 'moved')}"])
    assert stages.changes("convert", now, run_paths(now)) == {}
    stages.check(now, run_paths(now))


def test_seconds_are_merged_and_interrupted_attempts_count(tmp_path: Path) -> None:
    for stage, seconds, code in (
        ("prune", 10, 0),
        ("learn", 20, 75),
        ("learn", 30, 75),
        ("learn", 5, 0),
    ):
        assert ask(tmp_path, "record", stage, str(seconds), str(code)).returncode == 0
    assert json.loads((tmp_path / "stages.json").read_text()) == {"prune": 10, "learn": 55}


def test_the_stages_are_verbs() -> None:
    from megamask.config import load_config, run_paths
    from megamask.config.deciding import deciding_settings
    from megamask.verbs.table import VERBS

    config = load_config(RECIPE)
    script = (REPO / "launch" / "quickstart.sh").read_text()
    named = [line.split()[1] for line in script.splitlines() if line.startswith("stage ")]
    assert named == [
        "gguf",
        "convert",
        "tokenize",
        "prune",
        "learn",
        "export",
        "evaluate",
        "report",
    ] and set(named) <= set(VERBS)
    assert set(stages.READS) == set(named) - {"report"}
    assert all(deciding_settings(config, sections) for sections in stages.READS.values())
    assert all(
        stages.artefacts(stage, config, run_paths(config)) for stage in named if stage != "report"
    )
