"""A disk that is full ends each verb with one message, and leaves no half of an output."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_kills import AFTER_LEARNING, MADE, make_inputs, words_of
from tests.fork_server import ROOT, child_environment, fork_server

Settings = Callable[[Path], list[str]]
# words -> bytes that a file may have, and the output that does not fit; what the verb writes before
# fits, so that the error is that of the output
LIMITS = {
    "convert": (16_384, "weights"),
    "tokenize": (2_048, "shards/prose"),
    "learn": (16_384, "learn/snapshots/step-00000002"),
    "prune prune.methods=[magnitude]": (10_240, "masks/magnitude.safetensors"),
    "prune prune.methods=[sparsegpt_update]": (16_384, "weights-sparsegpt_update"),
    "export": (65_536, "export"),
    "report": (4_096, "pictures"),
}
AT_NIGHT = {
    "reorder": (65_536, "reordered"),
    "evaluate": (512, "results.json"),
    "sensitivity": (512, "sensitivity.json"),
    "recover": (65_536, "recovering-magnitude-reconstruct/layer-0001-0.safetensors"),
    "extract": (4_096, "out.safetensors"),
    "import": (4_096, "out.safetensors"),
    "push": (4_096, "push"),
    "plan": (512, "plan.json"),
    "diff": (512, "d.json"),
}


@pytest.mark.parametrize(
    "words", [*LIMITS, *(pytest.param(words, marks=pytest.mark.nightly) for words in AT_NIGHT)]
)
def test_a_verb_on_a_full_disk(
    words: str, settings: Settings, prepared: Path, general: Path, tmp_path: Path
) -> None:
    (limit, output), (verb, *more) = (LIMITS | AT_NIGHT)[words], words.split()
    run_dir = tmp_path / "run"
    shutil.copytree(general if verb in AFTER_LEARNING else prepared, run_dir)
    for name in MADE[verb] if verb != "learn" else ():
        shutil.rmtree(run_dir / name, ignore_errors=True)
    environment = child_environment()
    make_inputs(verb, tmp_path, prepared)
    line = [*words_of(verb, settings(run_dir), run_dir, tmp_path), *more]
    with tempfile.TemporaryFile("w+") as said:
        child = fork_server(environment).call(
            "tests.e2e.killing:run_limited", line, limit,
            stdout=said, stderr=said, environment=environment, cwd=ROOT,
        )  # fmt: skip
        code = child.wait(180)
        child.close()
        said.seek(0)
        text = said.read()
    errors = [line for line in text.splitlines() if line.startswith("megamask: error")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in text, f"{code}\n{text[-3000:]}"
    assert f"{run_dir / output}" in errors[0] and "cannot be written (" in errors[0]
    assert "then run the same command" in errors[0]
    left = [str(path) for path in run_dir.rglob(".*.tmp")]
    assert not left and (verb == "report" or not (run_dir / output).exists()), left
