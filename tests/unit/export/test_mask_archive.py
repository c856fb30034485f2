"""Masks as archives of MaskLLM and PATCH: read here as the tools read them, by NumPy alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import megamask
from megamask.__main__ import main
from megamask.errors import ArtifactError, ConfigError
from megamask.export import mask_archive
from megamask.masks.file import load_masks, save_masks
from megamask.masks.foreign.importing import import_masks
from megamask.sparsity.pattern import Pattern
from megamask.verbs.export import run
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import model_linears
from tests.unit.export.test_masked_folder import config, save_model

FILES = {"maskllm": "mask_compressed.npz", "patch": "mask.npz"}
Run = tuple[Path, Any]


def with_masks(folder: Path, model: Any, pattern: Pattern, method: str = "learned") -> Run:
    linears = model_linears(model)
    generator = torch.Generator().manual_seed(3)
    prints = BaseModel(folder / "hf").fingerprints().exact
    masks = {name: pattern.best(torch.rand(shape(one), generator=generator))
             for name, one in linears.items()}  # fmt: skip
    path = folder / "masks" / f"{method}.safetensors"
    save_masks(path, masks, pattern, fingerprint=prints, method=method)
    return folder, model


def shape(linear: Any) -> Any:
    """(O, I) of a linear, GPT-2's Conv1D included."""
    return linear.weight.shape[::-1] if hasattr(linear, "nf") else linear.weight.shape


@pytest.fixture
def llama(tmp_path: Path) -> Run:
    (tmp_path / "hf").mkdir()
    model = save_model(tmp_path / "hf")
    (tmp_path / "hf" / "LICENSE").write_text("of the base model")
    return with_masks(tmp_path, model, Pattern(2, 4))


def gpt2(folder: Path) -> Run:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50))
    model.save_pretrained(folder / "hf")
    return with_masks(folder, model, Pattern(2, 4))


def as_maskllm_reads(path: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bits of ``NAME.mask``, from the highest place on, in the shape of the parameter."""
    archive = np.load(path, allow_pickle=False)
    found = {}
    for key in archive.files:
        name = key[: -len(".mask")]
        bits = np.unpackbits(archive[key])[: parameters[name].numel()]
        found[name] = torch.from_numpy(bits.reshape(parameters[name].shape))
    return found


def as_patch_reads(path: Path, _: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bits of ``NAME``, in the shape of ``NAME.__shape__``."""
    archive = np.load(path, allow_pickle=False)
    assert json.loads(str(archive["__meta__"]))["pattern"] == "2:4"
    found = {}
    for key in archive.files:
        if key != "__meta__" and not key.endswith(".__shape__"):
            rows, columns = (int(size) for size in archive[f"{key}.__shape__"])
            bits = np.unpackbits(archive[key], count=rows * columns)
            found[key] = torch.from_numpy(bits.reshape(rows, columns))
    return found


READERS = {"maskllm": as_maskllm_reads, "patch": as_patch_reads}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_tools_make_the_same_model(kind: str, family: str, tmp_path: Path) -> None:
    if family == "gpt2":
        folder, model = gpt2(tmp_path)
    else:
        folder, model = with_masks(tmp_path, save_model(tmp_path / "hf"), Pattern(2, 4))
    run(config(folder, format=kind))
    parameters = dict(model.named_parameters())
    found = READERS[kind](folder / f"export-{kind}" / FILES[kind], parameters)
    theirs = {name: parameters[name].detach() * mask for name, mask in found.items()}
    path = folder / "masks" / "learned.safetensors"
    ours = dict(megamask.apply_masks(model, path).named_parameters())
    assert len(theirs) == len(load_masks(path))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize("kind", FILES)
def test_a_round_trip(kind: str, llama: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = llama
    words = [f"run_dir={folder}", f"export.out={folder / 'out'}"]
    assert main(["export", "--to", kind, *words]) == 0
    assert "written and verified" in capsys.readouterr().out
    written = folder / "out" / FILES[kind]
    back = folder / "back.safetensors"
    import_masks(written, back, BaseModel(folder / "hf"), "2:4", {})
    own = load_masks(folder / "masks" / "learned.safetensors")
    assert load_masks(back).content_sha256 == own.content_sha256
    assert (folder / "out" / "LICENSE").read_text() == "of the base model"
    assert not list((folder / "out").glob("*.safetensors"))
    first = written.read_bytes()
    assert main(["export", "--to", kind, *words]) == 0
    assert written.read_bytes() == first


def test_what_is_no_mask_alone_is_refused(llama: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = llama
    for key, value in (("mask", "dense"), ("weights", "w")):
        with pytest.raises(ConfigError, match=rf"export\.{key} = '{value}'.*holds a mask and no"):
            run(config(folder, format="patch", **{key: value}))
    (folder / "weights-sparsegpt_update").mkdir()
    with_masks(folder, model, Pattern(2, 4), "sparsegpt_update")
    note: dict[str, Any] = {"fingerprint": BaseModel(folder / "hf").fingerprints().exact}
    note |= {"method": "sparsegpt_update", "recipe": {}}
    (folder / "weights-sparsegpt_update" / "megamask.json").write_text(json.dumps(note))
    with pytest.raises(ArtifactError, match="belongs to weights that were updated"):
        run(config(folder, format="maskllm", mask="sparsegpt_update"))
    # a wrong archive is found by the check
    shutil.rmtree(folder / "weights-sparsegpt_update")
    monkeypatch.setattr(
        mask_archive, "_packed", lambda masks, name, known: np.packbits(~masks[name].numpy())
    )
    with pytest.raises(ArtifactError, match="does not hold the mask of"):
        run(config(folder, format="maskllm"))
    assert not list(folder.glob("export*"))
