"""The verb sensitivity against evaluations of the exported model, and the budget that follows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask import load_masks, save_masks
from megamask.evaluate.sensitivity import kept_dense, parts_of, ranked
from megamask.weights.architecture import read_architecture
from megamask.weights.mapping import linear_shapes, prunable
from tests.e2e.program import here, in_process, refusal

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
    # a mask with weights of its own
    said = refusal(in_process("sensitivity", *words, "sensitivity.mask=sparsegpt_update"))
    assert "belongs to updated weights" in said


def test_the_names_are_patterns_of_what_is_pruned_together(model: Path) -> None:
    arch = read_architecture(model)
    modules = list(linear_shapes(arch))
    for by, count in (("layer", 2), ("linear", 8)):
        parts = parts_of(arch, modules, by)
        assert len(parts) == count
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
