"""The model of the settings is the one that was converted: every verb that computes on the weights
of a run, or hands out what was measured on them, refuses another model, also one whose linears are
the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.program import here, in_process, refusal

pytestmark = pytest.mark.slow
PUSH = ("push", "me/mine", "--what", "model", "--dry-run")
MAGNITUDE = ("export.mask=magnitude", "prune.methods=[magnitude]", "evaluate.max_tokens=64")
COMPUTING: tuple[tuple[str, ...], ...] = (
    ("evaluate",),
    ("prune",),
    ("learn",),
    ("sensitivity",),
    ("recover", "recover.mask=magnitude", "recover.method=reconstruct"),
    ("export",),
    PUSH,
)


def test_no_verb_takes_another_model_for_the_converted_one(
    run_dir: Path,
    model: Path,
    other_model: Path,
    settings: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    words = [*settings(run_dir), *MAGNITUDE]
    here("evaluate", *words)
    same_linears = Path(shutil.copytree(model, tmp_path / "same-linears"))
    stored = load_file(same_linears / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"] * 0.5
    save_file(stored, same_linears / "model.safetensors", metadata={"format": "pt"})
    for folder, what in ((same_linears, "norms, embedding, head"), (other_model, "other weights")):
        for verb, *more in COMPUTING:
            said = refusal(in_process(verb, *more, *words, f"model.hf={folder}"))
            if folder is other_model and verb in ("export", "push"):  # which open the mask first
                assert "another base model" in said, said
            else:
                assert str(folder) in said and what in said and "verb convert" in said, said
    moved = [*words, f"model.hf={shutil.copytree(model, tmp_path / 'moved')}"]
    here(*PUSH, *moved)  # a copy is the same model
    assert "already holds this model" in here("convert", *moved).stderr

    changed = [*words, f"model.hf={same_linears}"]
    done = here("convert", *changed).stderr
    assert "has other norms" in done and "already holds" not in done
    said = refusal(in_process(*PUSH, *changed))  # results of the model of before
    assert "results.json" in said and "measured on another model" in said
    masks = run_dir / "masks" / "magnitude.safetensors"
    before = masks.stat().st_mtime_ns
    assert "made again" in here("prune", *changed).stderr
    assert masks.stat().st_mtime_ns != before
    dense = json.loads((run_dir / "results.json").read_text())["perplexity"]["dense"]
    here("evaluate", *changed)
    after = json.loads((run_dir / "results.json").read_text())["perplexity"]["dense"]
    assert after != pytest.approx(dense, rel=1e-4)
    here(*PUSH, *changed)
