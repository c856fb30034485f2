"""A model with an image tower through the verbs: its text part is pruned, learned and measured, and
what is handed out has the image tower that lay beside it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import megamask
from tests.e2e.conftest import run_settings, save_tokenizer
from tests.e2e.program import here, in_process, refusal
from tests.e2e.test_families import LEARN, perplexity
from tests.image_models import answer, image_model, is_text, save_image_model, tensors

pytestmark = pytest.mark.slow
LINEARS = 14
TOWER = "vision_tower.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_image_model(tmp_path_factory.mktemp("images") / "hf")
    save_tokenizer(folder, vocab_size=500)  # below the ids of images
    return folder


def test_another_image_tower_than_the_converted_one_is_not_handed_out(
    hf: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(hf, tmp_path / "hf"))
    words = [*run_settings(tmp_path / "run", copy, corpus), "prune.methods=[magnitude]"]
    chosen = [*words, "export.mask=magnitude"]
    for verb in ("convert", "tokenize", "prune"):
        here(verb, *words)
    here("export", *chosen)
    before = tensors(tmp_path / "run" / "export")
    stored = tensors(copy)
    stored[TOWER] = stored[TOWER] + 1e-4
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    push = ("push", "me/mine", "--what", "model", "--dry-run", *chosen)
    for line in (("export", *chosen), ("export", *words, "export.mask=dense"), push):
        said = refusal(in_process(*line))
        assert "other tensors beside its text part" in said and "convert again" in said
    kept = tensors(tmp_path / "run" / "export")
    assert all(torch.equal(one, before[name]) for name, one in kept.items())
    for line in (("convert", *words), ("export", *chosen), push):  # the new tower is taken
        here(*line)
    pushed = tensors(tmp_path / "run" / "push")
    after = tensors(tmp_path / "run" / "export")
    assert torch.equal(after[TOWER], stored[TOWER]) and not torch.equal(after[TOWER], before[TOWER])
    assert all(torch.equal(one, before[name]) for name, one in after.items() if name != TOWER)
    assert all(torch.equal(one, pushed[name]) for name, one in after.items())


@pytest.fixture(scope="module")
def run(hf: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after every verb, with a method that updates weights."""
    folder = tmp_path_factory.mktemp("images") / "run"
    words = [*run_settings(folder, hf, corpus), *LEARN[1:]]
    words.append("prune.methods=[wanda, sparsegpt_update]")
    for verb in ("convert", "tokenize", "prune", "learn", "export", "evaluate", "inspect"):
        here(verb, *words)
    here("export", *words, "export.mask=sparsegpt_update", f"export.out={folder / 'updated'}")
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("folder", "row"), [("export", "learned"), ("updated", "sparsegpt_update")]
)
def test_the_exported_folder_is_what_was_measured(
    hf: Path, run: Path, folder: str, row: str
) -> None:
    measured = json.loads((run / "results.json").read_text())["perplexity"]
    for domain in ("prose", "code"):
        found = perplexity(run / folder, run, domain)
        assert found == pytest.approx(measured[row][domain], rel=5e-5)  # four digits
        dense = perplexity(hf, run, domain)
        assert dense == pytest.approx(measured["dense"][domain], rel=5e-5)
        assert dense != pytest.approx(found, rel=1e-3)  # the protocol tells both apart
    before, after = tensors(hf), tensors(run / folder)
    assert sorted(before) == sorted(after)
    masks = megamask.load_masks(run / "masks" / f"{row}.safetensors")
    assert len(masks) == LINEARS
    for name, tensor in before.items():
        mask = masks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        assert (mask is not None) <= is_text(name)
        if mask is None:
            assert torch.equal(after[name], tensor), name
        else:
            assert not after[name][~mask].any()
            assert row != "learned" or torch.equal(after[name], tensor.masked_fill(~mask, 0.0))
    assert answer(run / folder).isfinite().all()


@pytest.mark.nightly
def test_masks_of_a_snapshot_are_extracted_and_compared(
    hf: Path, run: Path, corpus: Path, tmp_path: Path
) -> None:
    words, out = run_settings(run, hf, corpus), tmp_path / "mask.safetensors"
    snapshots = str(run / "learn" / "snapshots")
    here("extract", *words, snapshots, str(out), "--coding", "given-weights")
    learned = megamask.load_masks(run / "masks" / "learned.safetensors")
    for given in (hf, image_model()):
        found = megamask.load_masks(out, model=given)
        assert found.content_sha256 == learned.content_sha256 and len(found) == LINEARS
    said = here("diff", *words, "learned", str(out)).stdout
    assert "| **all** | 0.00%" in " ".join(said.split())
