"""The verb sensitivity against evaluations of the exported model, and the budget that follows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megamask import load_masks, save_masks
from megamask.evaluate.sensitivity import kept_dense, parts_of, ranked
from megamask.model.mask_shards import linear_rules
from megamask.weights.architecture import read_architecture
from megamask.weights.mapping import linear_shapes, prunable
from tests.e2e.program import here, in_process, refusal
from tests.fork_server import ROOT

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]


def test_layers_one_at_a_time(
    prepared: Path, settings: Settings, model: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(prepared, tmp_path / "run"))
    file = run_dir / "sensitivity.json"
    words = [*settings(run_dir), "sensitivity.mask=magnitude", "sensitivity.keep_dense=0.5"]
    said = here("sensitivity", *words).stdout
    found = json.loads(file.read_text())
    names = ["model.layers.0.*", "model.layers.1.*"]
    assert list(found["loss"]) == names and set(found["ranked"]) == set(names)
    mean = {name: sum(found["increase"][name].values()) for name in names}
    assert found["ranked"] == sorted(names, key=lambda name: -mean[name])
    assert found["kept_dense"] == found["ranked"][:1]
    assert f'model.exclude=["{found["ranked"][0]}"]' in said
    assert (run_dir / "sensitivity.md").read_text().strip() == said.strip()
    assert (run_dir / "sensitivity.png").read_bytes().startswith(b"\x89PNG")

    # The verb evaluate on masks of one layer each, whose results tell the density of the model.
    masks, given = load_masks(run_dir / "masks" / "magnitude.safetensors"), {}
    for number, part in enumerate(names):
        own = {name: mask for name, mask in masks.items() if name.startswith(part[:-1])}
        assert len(own) == 7
        path = tmp_path / f"layer-{number}.safetensors"
        save_masks(path, own, "2:4", fingerprint=masks.fingerprint, method="magnitude")
        given[part] = str(path)
    chosen = ", ".join(f"layer-{number}: {path}" for number, path in enumerate(given.values()))
    here("evaluate", *settings(run_dir), f"evaluate.masks={{{chosen}}}")
    results = json.loads((run_dir / "results.json").read_text())
    assert results["density"] == {"dense": 1.0, "layer-0": 0.75, "layer-1": 0.75}
    rows = {"dense": found["dense"]} | {
        f"layer-{number}": found["loss"][part] for number, part in enumerate(names)
    }
    for row, losses in rows.items():
        for domain, perplexity in results["perplexity"][row].items():
            # windows are compared with the dense model one by one there and summed in another order
            assert losses[domain] == pytest.approx(math.log(perplexity), rel=1e-6)
    assert rows["layer-0"] != pytest.approx(rows["layer-1"], rel=1e-6)
    # Another run reuses what is there; a torn file and another mask are measured again.
    half = {**found, "loss": {names[0]: {**found["loss"][names[0]], "prose": 99.0}}}
    file.write_text(json.dumps(half))
    here("sensitivity", *words)
    again = json.loads(file.read_text())
    assert again["loss"][names[0]]["prose"] == 99.0  # taken over
    assert again["loss"][names[1]] == found["loss"][names[1]]  # measured
    here("sensitivity", *words, "sensitivity.mask=wanda")
    assert json.loads(file.read_text())["loss"][names[0]]["prose"] < 99.0
    # Other text of the same number of tokens is measured again.
    tokens = run_dir / "shards" / "prose" / "heldout.bin"
    text = np.fromfile(tokens, dtype=np.uint16)
    np.concatenate([text[64:], text[:64]]).tofile(tokens)
    here("sensitivity", *words, "sensitivity.mask=wanda")
    other = json.loads(file.read_text())
    assert other["dense"]["prose"] != pytest.approx(again["dense"]["prose"], rel=1e-6)
    # a mask with weights of its own
    said = refusal(in_process("sensitivity", *words, "sensitivity.mask=sparsegpt_update"))
    assert "belongs to updated weights" in said


SMALL = {"num_hidden_layers": 2, "num_local_experts": 5, "num_experts": 5}


@pytest.mark.parametrize("shape", [None, "mixtral-8x7b", "qwen1.5-moe-a2.7b", "nemotron-4-15b"])
def test_the_names_are_patterns_of_what_is_pruned_together(
    model: Path, tmp_path: Path, shape: str | None
) -> None:
    if shape is not None:
        known = json.loads((ROOT / f"megamask/weights/known/{shape}.json").read_text())
        smaller = {key: value for key, value in SMALL.items() if key in known}
        model = tmp_path
        (model / "config.json").write_text(json.dumps(known | smaller))
    arch = read_architecture(model)
    modules = list(linear_shapes(arch))
    for by in ("layer", "linear"):
        parts = parts_of(arch, modules, by)
        assert len(parts) == (2 if by == "layer" else len(linear_rules(arch)))
        left = [prunable(arch, ["*"], [part.name]) for part in parts]
        without = [set(modules) - set(one) for one in left]
        assert set.union(*without) == set(modules)
        assert sum(map(len, without)) == len(modules), [part.name for part in parts]


def test_a_budget_takes_the_most_sensitive() -> None:
    dense = {"prose": 2.0, "code": 1.0}
    rows = {f"layer {n}": {"prose": 2.0 + n % 3, "code": 1.0} for n in range(10)}
    assert ranked(dense, rows)[:4] == ["layer 2", "layer 5", "layer 8", "layer 1"]  # ties in order
    assert kept_dense(dense, rows, 0.4) == ["layer 1", "layer 2", "layer 5", "layer 8"]
    assert kept_dense(dense, rows, 0.0) == []
