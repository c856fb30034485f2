"""``tasks.folder``: what the verb tasks refuses before a task or a model is loaded, and the name of
the row of a folder and the mask that it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.config import load_config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.evaluate.loglikelihood import Score
from megamask.export.folded import STAMP, WRITTEN, write_stamp
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.masks.identity import RECOVERED, identity, why_no_row_of
from megamask.publish.measured import measured
from megamask.sparsity.pattern import Pattern
from megamask.verbs import export, tasks
from megamask.weights.base_model import BaseModel
from megamask.weights.mapping import linear_shapes
from tests.unit.export.test_masked_folder import save_model

UPDATED = {"updated_weights": True}
LORA = {"mask": "wanda", "method": "lora", "weights": "e" * 64}
RECIPE = {**UPDATED, "data": {RECOVERED: LORA}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_model(folder)
    return folder


@pytest.fixture(autouse=True)
def harness_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is looked for first, and needed later than every refusal here."""
    monkeypatch.setattr(tasks, "find_spec", lambda name: name)


def score(hf: Path, folder: Path, run_dir: Path) -> None:
    words = [f"run_dir={run_dir}", f"model.hf={hf}", f"tasks.folder={folder}", "device=cpu"]
    tasks.run(load_config(None, words))


def test_a_folder_that_is_called_as_the_dense_row_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(copytree(model, tmp_path / "dense"))
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner")
    for path in (folder, Path("..")):
        with pytest.raises(ConfigError, match=r"tasks\.folder.*dense is the row of model\.hf"):
            score(model, path, tmp_path / "run")


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_another(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.more": torch.ones(2)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lacking, "misses tensors: model.norm.weight"),
        (with_another, "has unknown tensors: model.more"),
        (without_weights, "model.safetensors"),
    ],
)
def test_both_folders_must_hold_the_tensors_of_their_config(
    change: Callable[[Path], None], says: str, model: Path, tmp_path: Path
) -> None:
    broken = Path(copytree(model, tmp_path / "broken"))
    change(broken)
    for hf, folder in ((model, broken), (broken, model)):
        with pytest.raises(ArtifactError, match=f"broken.*{says}"):
            score(hf, folder, tmp_path / "run")
    assert not (tmp_path / "run" / "tasks.json").exists()


def mask_of(hf: Path, run_dir: Path, method: str, **more: Any) -> MaskSet:
    """The mask of the largest weights, as the mask of a method of the run."""
    base, pattern = BaseModel(hf), Pattern(2, 4)
    with base.open() as source:
        masks = {
            name: pattern.best(source.tensor(f"{name}.weight").abs())
            for name in linear_shapes(base.architecture())
        }
    path = run_dir / "masks" / f"{method}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    exact = base.fingerprints().exact
    save_masks(path, masks, pattern, fingerprint=exact, method=method, **more)
    return load_masks(path)


@pytest.fixture
def without_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose accuracy tells the weights of its row apart: their loss on a few tokens."""

    def opened(config: Any, arch: Any) -> tasks._Session:
        known: Any = SimpleNamespace(facts=dict, found={"group_map": {}})
        tokenizer: Any = SimpleNamespace(name="tokenizer", fingerprint="f")
        return tasks._Session(config, known, tokenizer, [], 8)

    def row(self: Any, name: str, weights: Path, score: Score, *_: Any) -> Any:
        tokens = torch.arange(1, 9)[None]
        with torch.no_grad():
            return {"task": {"acc": float(score(tokens, tokens)[0].mean())}}

    monkeypatch.setattr(tasks._Session, "opened", opened)
    monkeypatch.setattr(tasks._Session, "row", row)
    monkeypatch.setattr(tasks, "version", lambda name: "0")


@pytest.mark.parametrize(
    ("method", "more", "folder", "row"),
    [
        ("magnitude", {}, "export", "export"),
        ("learned", {}, "magnitude", "magnitude"),
        ("sparsegpt_update", UPDATED, "export", "export"),
        ("wanda-lora", RECIPE, "mine", "mine, recovered (wanda + lora)"),
        ("wanda-lora", RECIPE, "wanda-lora", "recovered (wanda + lora)"),
        ("wanda-lora", RECIPE, "dense", "dense, recovered (wanda + lora)"),
    ],
)
def test_the_row_of_an_exported_folder_has_its_name_and_belongs_to_its_mask(
    method: str,
    more: dict[str, Any],
    folder: str,
    row: str,
    model: Path,
    tmp_path: Path,
    without_harness: None,
) -> None:
    run_dir, out, given = tmp_path / "run", tmp_path / folder, "magnitude" if more else method
    mask_of(model, run_dir, given)
    words = [f"run_dir={run_dir}", f"model.hf={model}", f"export.mask={given}"]
    config = load_config(None, [*words, f"export.out={out}"])
    export.run(config)
    if more:  # as the verbs write it that update or recover weights
        made = mask_of(model, run_dir, method, **more)
        write_stamp(out, made, BaseModel(out).fingerprints().exact)
    score(model, out, run_dir)
    masks = load_masks(run_dir / "masks" / f"{method}.safetensors")
    results = json.loads((run_dir / "tasks.json").read_text())
    assert list(results["tasks"]) == ["dense", row]
    assert f"| {row} " in (run_dir / "tasks.md").read_text()
    assert results["tasks"]["dense"] != results["tasks"][row]
    assert results["masks"] == {row: identity(masks)}
    assert list(measured(run_paths(config), masks, {})["tasks.json"]["tasks"]) == ["dense", row]
    other = mask_of(model, tmp_path / "other", "other", updated_weights=not more)
    assert why_no_row_of(other, results, row) and not why_no_row_of(masks, results, row)


@pytest.fixture
def exported(model: Path, tmp_path: Path, without_harness: None) -> Path:
    """A run with an export of the model under a mask."""
    mask_of(model, tmp_path / "run", "learned")
    export.run(load_config(None, [f"run_dir={tmp_path / 'run'}", f"model.hf={model}"]))
    return tmp_path / "run"


def trained(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = {name: one * 1.5 for name, one in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def with_other_norms(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    norm = {"model.norm.weight": tensors["model.norm.weight"] * 2}
    save_file(tensors | norm, folder / "model.safetensors", metadata={"format": "pt"})


def with_other_config(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "rms_norm_eps": 0.1}))


def without_a_fingerprint(folder: Path) -> None:
    stamp = json.loads((folder / STAMP).read_text())
    (folder / STAMP).write_text(json.dumps({**stamp, WRITTEN: None}))


@pytest.mark.parametrize(
    "change", [trained, with_other_norms, with_other_config, without_a_fingerprint]
)
def test_a_folder_that_was_changed_has_the_row_of_no_mask(
    change: Callable[[Path], None], exported: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fine-tuning that saves into the folder leaves the stamp of the export there."""
    change(exported / "export")
    score(model, exported / "export", exported)
    results = json.loads((exported / "tasks.json").read_text())
    assert list(results["tasks"]) == ["dense", "export"] and results["masks"] == {}
    assert "was changed since the export" in caplog.text


def test_an_export_of_another_model_is_refused(exported: Path, model: Path, tmp_path: Path) -> None:
    """Its row would stand beside the dense row of a model that it was not made of."""
    other = Path(copytree(model, tmp_path / "other-model"))
    trained(other)
    with pytest.raises(ConfigError, match=r"tasks\.folder.*an export of the model in model\.hf"):
        score(other, exported / "export", exported)
    assert not (exported / "tasks.json").exists()


def test_the_row_of_a_folder_without_a_mask_belongs_to_none(
    model: Path, tmp_path: Path, without_harness: None
) -> None:
    run_dir = tmp_path / "run"
    export.run(load_config(None, [f"run_dir={run_dir}", f"model.hf={model}", "export.mask=dense"]))
    for folder in (run_dir / "export", Path(copytree(model, tmp_path / "plain"))):
        score(model, folder, run_dir)
        results = json.loads((run_dir / "tasks.json").read_text())
        assert list(results["tasks"]) == ["dense", folder.name] and results["masks"] == {}
        assert results["tasks"]["dense"] == results["tasks"][folder.name]
