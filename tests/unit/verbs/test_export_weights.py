"""The verb export with ``export.weights``: a mask goes on the weights of its own model alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.config import Config, load_config
from megamask.errors import ArtifactError
from megamask.export.folded import STAMP, WRITTEN
from megamask.masks.file import save_masks
from megamask.safe_checkpoint import NOTE
from megamask.sparsity.pattern import Pattern
from megamask.verbs import convert, export
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import model_linears
from tests.unit.export.test_masked_folder import save_model


def settings(run: Path, *words: str) -> Config:
    return load_config(None, [f"run_dir={run}", "device=cpu", *words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted runs: of a model with a mask, of another model, and of one with another norm."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("base", 0), ("other", 1), ("norm", 0)):
        model = save_model(folder / name / "hf", seed)
        if name == "norm":
            file = folder / name / "hf" / "model.safetensors"
            stored = load_file(file)
            stored["model.norm.weight"] *= 2
            save_file(stored, file, metadata={"format": "pt"})
        convert.run(settings(folder / name))
        if name == "base":
            best = Pattern(2, 4).best
            masks = {one: best(linear.weight.abs()) for one, linear in model_linears(model).items()}
            exact = BaseModel(folder / name / "hf").fingerprints().exact
            path = folder / name / "masks" / "learned.safetensors"
            save_masks(path, masks, "2:4", fingerprint=exact, method="learned")
    return folder


@pytest.mark.parametrize(
    ("name", "note", "words"),
    [
        ("other", "own", "has other weights .* than when"),
        ("norm", "own", "has other norms, embedding, head or biases than when"),
        ("other", "of base", "is not the base model of the mask.*has other weights"),
        ("other", "none", "is not the base model of the mask.*has other weights"),
        ("norm", "none", "is not the base model of the mask.*has other norms"),
    ],
)
def test_a_mask_takes_no_weights_of_another_model(
    runs: Path, tmp_path: Path, name: str, note: str, words: str
) -> None:
    weights = Path(shutil.copytree(runs / name / "weights", tmp_path / "weights"))
    if note == "none":
        (weights / NOTE).unlink()
    elif note == "of base":
        shutil.copy(runs / "base" / "weights" / NOTE, weights)
    given = (f"export.weights={weights}", f"export.out={tmp_path / 'out'}")
    with pytest.raises(ArtifactError, match=words):
        export.run(settings(runs / "base", *given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_note", [True, False])
def test_a_mask_takes_the_weights_of_its_model(runs: Path, tmp_path: Path, has_note: bool) -> None:
    weights = Path(shutil.copytree(runs / "base" / "weights", tmp_path / "weights"))
    if not has_note:
        (weights / NOTE).unlink()
    for out, more in (("plain", ()), ("given", (f"export.weights={weights}",))):
        export.run(settings(runs / "base", *more, f"export.out={tmp_path / out}"))
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "given"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_dense_export_says_which_weights_it_holds(runs: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(runs / "other" / "weights", tmp_path / "weights"))
    (weights / NOTE).unlink()
    found = {}
    for form in ("hf", "megatron"):
        given = (f"export.weights={weights}", "export.mask=dense", f"export.format={form}")
        export.run(settings(runs / "base", *given, f"export.out={tmp_path / form}"))
        found[form] = json.loads((tmp_path / form / STAMP).read_text())[WRITTEN]
    other = BaseModel(runs / "other" / "hf").fingerprints().exact
    assert found == {"hf": other, "megatron": other}
