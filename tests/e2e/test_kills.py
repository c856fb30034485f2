"""A verb that was killed at any moment is run again: the same files are there, and no others.

The moments are the events at which the verb opens, makes, renames or deletes a file, so they are
the same in every run. The normal tier kills six verbs (``IN_NORMAL_TIER``) at two moments, one
after the other without a repair between. Only the nightly tier kills ``learn``, ``evaluate`` and
the others: every verb at 20 moments, each on a fresh copy. ``NOT_KILLED`` says why a verb is left
out.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamask.masks.file import load_masks
from megamask.verbs.table import VERBS
from tests.e2e.program import RECIPE
from tests.fork_server import ROOT, child_environment, fork_server

Settings = Callable[[Path], list[str]]
TIMED = ("seconds", "times", "tokens_per_second", "memory_gib", "eta_seconds")
# What tells times, or belongs to other programs: their content differs from run to run.
OTHERS = ("log.txt", "metrics.jsonl", "tensorboard", "wandb", "versions.json", "stages.json",
          "heartbeat.json")  # fmt: skip
NIGHTLY_KILLS = 20
OUT = "out.safetensors"  # of extract and import


def words_of(verb: str, settings: list[str], run_dir: Path, tmp_path: Path) -> list[str]:
    """The command line of a verb."""
    more = {
        "prune": ["prune.methods=[magnitude,sparsegpt_update]"],
        "extract": [str(run_dir / "learn" / "snapshots"), str(run_dir / OUT)],
        "import": [str(tmp_path / "mask_compressed.npz"), str(run_dir / OUT)],
        "evaluate": ["prune.methods=[magnitude]"],
        "diff": ["magnitude", "wanda", "--json", str(run_dir / "d.json"), "--picture",
                 str(run_dir / "d.png")],
        "plan": ["--json", str(run_dir / "plan.json"), "--gpu", "h100"],
        "reorder": [str(run_dir / "reordered")],
        "push": ["owner/name", "--dry-run"],
        "sensitivity": ["sensitivity.mask=magnitude"],
        "recover": ["recover.mask=magnitude", "recover.method=reconstruct"],
    }  # fmt: skip
    if verb == "pipeline":
        return ["pipeline", "record", "learn", "1.5", "0", "--config", str(RECIPE), *settings]
    if verb == "gguf":
        own = [f"model.gguf={tmp_path / 'm.gguf'}", f"model.hf={run_dir / 'hf'}"]
        return ["gguf", f"run_dir={run_dir}", *own]
    return [verb, *more.get(verb, []), "--config", str(RECIPE), *settings]


# verb -> what is deleted before it: it makes these
MADE: dict[str, list[str]] = {
    "convert": ["weights"],
    "tokenize": ["shards"],
    "prune": ["masks", "weights-sparsegpt_update", "shards/cache"],
    "learn": ["shards/cache"],
    "evaluate": [],
    "export": [],
    "push": [],
    "extract": [],
    "import": [],
    "report": [],
    "diff": [],
    "plan": [],
    "reorder": ["shards/cache"],
    "sensitivity": [],
    "recover": ["shards/cache"],
    "gguf": [],
    "pipeline": [],
}
NOT_KILLED = {
    "submit": "each start makes a folder of its own, launch/NNN, with its time and variables; a "
    "folder without its last file is no launch",
    "tasks": "needs lm-eval, which the pinned environment leaves out; writes tasks.json and "
    "tasks.md at its end, each whole",
    "speed": "needs a GPU; a run that goes on is tested in one process, "
    "tests/unit/runtime/test_speed_run.py",
    "stop": "writes the file STOP, whose presence is its content",
}
IN_NORMAL_TIER = ("convert", "tokenize", "prune", "export", "extract", "report")
AFTER_LEARNING = ("evaluate", "export", "push", "extract", "report", "pipeline")


def start(verb: str, prepared: Path, general: Path, run_dir: Path) -> None:
    """Make the run folder as it is before the verb."""
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(general if verb in AFTER_LEARNING else prepared, run_dir)
    for name in MADE[verb]:
        shutil.rmtree(run_dir / name, ignore_errors=True)


def start_again(verb: str, run_dir: Path) -> None:
    """What a user does before the second run: ``extract`` and ``import`` replace no file."""
    if verb in ("extract", "import"):
        (run_dir / OUT).unlink(missing_ok=True)


def run(words: list[str], run_dir: Path, moment: int = 0) -> list[str]:
    """Run a command; the events of a run that ended, none of a killed run.

    Raises:
        AssertionError: it ended otherwise than it should.
    """
    log = run_dir.with_name("events.json")
    log.unlink(missing_ok=True)
    environment = child_environment()
    with tempfile.TemporaryFile("w+") as said:
        child = fork_server(environment).call(
            "tests.e2e.killing:run", words, str(run_dir), moment, str(log),
            stdout=said, stderr=said, environment=environment, cwd=ROOT,
        )  # fmt: skip
        code = child.wait(120)
        child.close()
        said.seek(0)
        text = said.read()
    assert code == (-9 if moment else 0), f"{words}: {code}\n{text[-3000:]}"
    return [] if moment else list(json.loads(log.read_text()))


def made(run_dir: Path) -> dict[str, Any]:
    """Relative path -> content.

    Left out is what differs between two runs that nobody killed, because it tells times:
    ``OTHERS``, and ``TIMED`` of JSON files. Everything else is compared byte by byte, as are mask
    files with their headers, and snapshots and weights with their index.
    """
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if not path.is_file() or any(part in OTHERS for part in path.relative_to(run_dir).parts):
            continue
        if path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMED}
    return value


def check_same(run_dir: Path, expected: dict[str, Any], what: str) -> None:
    again = made(run_dir)
    assert again.keys() == expected.keys(), f"{what}: {sorted(again.keys() ^ expected.keys())}"
    different = [name for name in expected if again[name] != expected[name]]
    assert not different, f"{what}: {different}"


def chosen(events: list[str], count: int) -> list[int]:
    """Moments of the events: their last rename, and others from the first to the last."""
    renames = [number for number, event in enumerate(events, 1) if event == "os.rename"]
    spread = [1 + place * (len(events) - 1) // max(count - 1, 1) for place in range(count)]
    return sorted({*renames[-1:], *spread})


def make_inputs(verb: str, folder: Path, prepared: Path) -> None:
    """Write the inputs that a verb reads from outside of the run folder."""
    if verb == "gguf":
        from tests.unit.weights.test_from_gguf import write_gguf

        write_gguf(folder / "m.gguf")
    if verb == "import":
        masks = load_masks(prepared / "masks" / "magnitude.safetensors")
        packed: dict[str, Any] = {
            f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in masks.items()
        }
        np.savez_compressed(folder / "mask_compressed.npz", **packed)


@pytest.fixture
def case(
    tmp_path: Path, settings: Settings, prepared: Path
) -> Callable[[str], tuple[Path, list[str]]]:
    """``case(verb)``: run folder and command line."""

    def make(verb: str) -> tuple[Path, list[str]]:
        run_dir = tmp_path / "run"
        make_inputs(verb, tmp_path, prepared)
        return run_dir, words_of(verb, settings(run_dir), run_dir, tmp_path)

    return make


Case = Callable[[str], tuple[Path, list[str]]]


def test_every_verb_that_writes_is_killed_here() -> None:
    writing = {name for name, verb in VERBS.items() if verb.writes}
    assert writing - MADE.keys() == NOT_KILLED.keys() & writing
    assert MADE.keys() - writing == {"pipeline"}  # the questions of quickstart.sh
    assert not NOT_KILLED.keys() & MADE.keys() and set(IN_NORMAL_TIER) <= MADE.keys()


@pytest.mark.parametrize("verb", IN_NORMAL_TIER)
def test_a_verb_that_was_killed_again_and_again(
    verb: str, case: Case, prepared: Path, general: Path
) -> None:
    run_dir, words = case(verb)
    start(verb, prepared, general, run_dir)
    events, expected = run(words, run_dir), made(run_dir)
    assert events, "a verb without an event writes nothing"
    start(verb, prepared, general, run_dir)
    renames = [number for number, event in enumerate(events, 1) if event == "os.rename"]
    moments = [renames[-1], 2]  # nearly done, and just begun again
    for moment in moments:
        run(words, run_dir, moment)
        start_again(verb, run_dir)
    run(words, run_dir)
    check_same(run_dir, expected, f"{verb} after kills at {moments} of {len(events)}")


@pytest.mark.nightly
@pytest.mark.parametrize("verb", MADE)
def test_a_verb_that_was_killed_at_many_moments(
    verb: str, case: Case, prepared: Path, general: Path
) -> None:
    run_dir, words = case(verb)
    start(verb, prepared, general, run_dir)
    events, expected = run(words, run_dir), made(run_dir)
    for moment in chosen(events, NIGHTLY_KILLS):
        start(verb, prepared, general, run_dir)
        run(words, run_dir, moment)
        start_again(verb, run_dir)
        run(words, run_dir)
        check_same(run_dir, expected, f"{verb} after a kill at {moment} of {len(events)}")
