"""The verb sensitivity against evaluations of the exported model, and the budget that follows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest

from megamask import load_masks, save_masks
from megamask.evaluate.sensitivity import Part, PartLosses, kept_dense, parts_of, ranked
from megamask.model.mask_shards import linear_rules
from megamask.weights.architecture import read_architecture
from megamask.weights.mapping import linear_shapes, prunable
from tests.e2e.program import contents, here, in_process, refusal
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
    assert f'model.exclude_sensitive=["{found["ranked"][0]}"]' in said
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


def test_a_budget_keeps_the_most_sensitive_dense(
    prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    """sensitivity -> prune, learn and plan at half of the layers; rows of Table 15; what belongs to
    another model, pattern or text is refused.
    """
    run_dir = Path(shutil.copytree(prepared, tmp_path / "run"))
    words, file = settings(run_dir), run_dir / "sensitivity.json"
    budget = "model.exclude_sensitive=0.5"
    assert "Run megamask prune and megamask sensitivity" in refusal(
        in_process("prune", *words, budget)
    )
    ask = [*words, "sensitivity.mask=magnitude", "sensitivity.rows=[0, 1, 2]"]
    said = here("sensitivity", *ask).stdout
    found = json.loads(file.read_text())
    dense, rows = found["dense"], found["rows"]
    first, other = found["ranked"]
    assert [rows[count]["kept_dense"] for count in "012"] == [[], [first], [first, other]]
    assert [rows[count]["density"] for count in "012"] == [0.5, 0.75, 1.0]
    # With one of two layers dense, the other is pruned alone; sums of the same order.
    assert rows["1"]["loss"] == found["loss"][other] and rows["2"]["loss"] == dense
    assert rows["0"]["loss"] != rows["1"]["loss"]
    assert "| 1 most sensitive |" in said and f"{math.exp(rows['0']['loss']['prose']):,.2f}" in said
    here("sensitivity", *ask)  # nothing is measured again
    assert json.loads(file.read_text()) == found
    message = refusal(in_process("sensitivity", *ask, "sensitivity.rows=[3]"))
    assert "sensitivity.rows = 3" in message and "there are 2" in message

    # plan shows the choice, prune and learn follow it and record it
    shown = here("plan", *words, budget).stdout
    assert "| dense" in shown and "75.0%" in shown
    pruning = [*words, "prune.methods=[magnitude, sparsegpt]"]
    here("prune", *pruning, budget)
    learning = [*words, "learn.steps=2", "data.seq_length=16"]
    here("learn", *learning, budget)
    learned = run_dir / "masks" / "learned.safetensors"
    for method in ("magnitude", "sparsegpt", "learned"):
        masks = load_masks(run_dir / "masks" / f"{method}.safetensors")
        assert len(masks) == 7 and all(name.startswith(other[:-1]) for name in masks)
        assert masks.meta["data"]["exclude_sensitive"] == [first]
    here("report", *words)
    assert "exclude_sensitive" in (run_dir / "report.html").read_text()
    # The same by the list in config.yaml, without the file; the finished run is the same one.
    whole = contents(run_dir / "masks")
    moved = tmp_path / "sensitivity.json"
    shutil.move(file, moved)
    given = f'model.exclude_sensitive=["{first}"]'
    assert first in (run_dir / "learn" / "config.yaml").read_text()
    here("prune", *pruning, given)
    here("learn", *learning, given)
    assert contents(run_dir / "masks") == whole and learned.exists()
    shutil.move(moved, file)
    before = contents(run_dir)
    for by in ("layer", "linear"):  # parts with other names, and of fewer linears
        message = refusal(in_process("sensitivity", *ask, f"sensitivity.by={by}"))
        assert "measured 14 linears, of which the mask lacks 7" in message
    tokens = run_dir / "shards" / "prose" / "heldout.bin"
    for verb, more, why in (
        ("prune", ["pattern=4:8"], "was measured with 2:4 for"),
        ("learn", ["pattern=4:8"], "was measured with 2:4 for"),
        ("learn", ['pattern_overrides={"*.down_proj": "6:8"}'], "would be 6:8"),
        ("plan", ["pattern=4:8"], "was measured with 2:4 for"),
        ("prune", ["evaluate.max_tokens=64"], "was measured on other text: text_sha256"),
        ("prune", ["model.exclude_sensitive=0.1"], "rounds to none"),
        ("prune", ["model.exclude_sensitive=1"], "number from 0 to below 1"),
        ("prune", [f"model.exclude=[{other}]"], "must leave at least one linear"),
        ("reorder", [str(tmp_path / "out")], "where no share is looked up"),
    ):
        asked = more if more[0].startswith("model.exclude_sens") else [*more, budget]
        assert why in refusal(in_process(verb, *words, *asked)), (verb, more)
    assert contents(run_dir) == before
    for change, why in (
        ({"made_from": {**found["made_from"], "fingerprint": "0" * 64}}, "on another model"),
        ({"loss": {first: found["loss"][first]}}, "is not finished: it has 1 of 2 parts"),
        ({"dense": {"prose": "none"}}, "holds no losses by domain"),
        ({"loss": {**found["loss"], first: {}}}, "holds no losses by domain"),
        ({"made_from": {**found["made_from"], "linears": []}}, "did not measure model.layers.0."),
    ):
        file.write_text(json.dumps({**found, **change}))
        for verb in ("prune", "plan"):
            assert why in refusal(in_process(verb, *words, budget)), (verb, change)
    file.write_text(json.dumps(found))
    text = np.fromfile(tokens, dtype=np.uint16)
    np.concatenate([text[64:], text[:64]]).tofile(tokens)
    assert "other text: text_sha256" in refusal(in_process("prune", *words, budget))


def test_a_killed_run_keeps_its_rows_and_dense_linears_count_as_not_measured(
    prepared: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that lacks o_proj is measured by layer: the name of a part, model.layers.0.*, matches
    o_proj, whose sensitivity nobody knows.
    """
    run_dir = Path(shutil.copytree(prepared, tmp_path / "run"))
    words, file = settings(run_dir), run_dir / "sensitivity.json"
    whole, part = (
        load_masks(run_dir / "masks" / "magnitude.safetensors"),
        tmp_path / "p.safetensors",
    )
    left = {name: mask for name, mask in whole.items() if not name.endswith("o_proj")}
    save_masks(part, left, "2:4", fingerprint=whole.fingerprint, method="magnitude")
    ask = [*words, f"sensitivity.mask={part}", "sensitivity.rows=[2, 0, 1]"]
    measured: list[str] = []
    pruned = PartLosses.pruned

    def counted(losses: PartLosses, parts: Collection[Part], row: str) -> dict[str, float]:
        if len(measured) == 4:  # two parts and the rows 2 and 0 are done
            raise KeyboardInterrupt
        measured.append(row)
        return pruned(losses, parts, row)

    monkeypatch.setattr(PartLosses, "pruned", counted)
    assert in_process("sensitivity", *ask).code
    killed = json.loads(file.read_text())
    assert list(killed["rows"]) == ["0", "2"] and len(killed["ranked"]) == 2
    measured.clear()
    here("sensitivity", *ask)
    assert measured == ["1 parts dense"]
    found = json.loads(file.read_text())
    assert list(found["rows"]) == ["0", "1", "2"]
    assert {**found, "rows": {**found["rows"], "1": None}} == {
        **killed,
        "rows": {"0": killed["rows"]["0"], "1": None, "2": killed["rows"]["2"]},
    }
    assert found["made_from"]["linears"] == sorted(left) and len(left) == 12

    budget = "model.exclude_sensitive=0.5"
    for verb in ("prune", "learn", "plan"):
        message = refusal(in_process(verb, *words, budget))
        assert "did not measure model.layers.0.self_attn.o_proj" in message, verb
    here("plan", *words, budget, 'model.exclude=["*.o_proj"]')


def test_a_snapshot_that_goes_away_meanwhile(
    general: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that still learns deletes its older snapshots."""
    run_dir = Path(shutil.copytree(general, tmp_path / "run"))
    snapshots, dense = run_dir / "learn" / "snapshots", PartLosses.dense
    mask = f"sensitivity.mask={snapshots}"

    def meanwhile(losses: PartLosses) -> dict[str, float]:
        shutil.rmtree(snapshots)
        return dense(losses)

    monkeypatch.setattr(PartLosses, "dense", meanwhile)
    here("sensitivity", *settings(run_dir), mask)
    found = json.loads((run_dir / "sensitivity.json").read_text())
    assert len(found["ranked"]) == 2 and not list(run_dir.glob("*.safetensors"))
    monkeypatch.undo()
    here("sensitivity", *settings(run_dir), "sensitivity.mask=learned")
    again = json.loads((run_dir / "sensitivity.json").read_text())
    assert again["loss"] == found["loss"]  # of the same mask


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
