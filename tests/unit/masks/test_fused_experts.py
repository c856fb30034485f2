"""Masks on experts that transformers holds together in memory, by their names in the files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import megamask
from megamask.errors import ArtifactError
from megamask.masks.file import save_masks
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import fingerprint_model
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import linear_shapes
from megamask.weights.wrapped_names import unwrapped
from tests.parity.variants import VARIANTS, make

P24 = Pattern(2, 4)


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and masks of all linears but those of expert 1 and of the attention."""
    folder = tmp_path_factory.mktemp("experts")
    hf = make(folder / "hf", VARIANTS[request.param], 0)
    weights, arch = load_file(hf / "model.safetensors"), read_architecture(hf)
    masks = {
        name: P24.best(weights[f"{name}.weight"].abs())
        for name in linear_shapes(arch)
        if ".experts.1." not in name and "self_attn" not in name
    }
    found = BaseModel(hf).fingerprints()
    save_masks(folder / "m.safetensors", masks, P24, fingerprint=found.exact, method="magnitude")
    return folder


def load(hf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf)


def test_the_fingerprint_is_that_of_the_files(run: Path) -> None:
    assert fingerprint_model(load(run / "hf")) == BaseModel(run / "hf").fingerprints().exact


def test_masks_apply_and_change_places(run: Path) -> None:
    dense, model = load(run / "hf").state_dict(), load(run / "hf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = run / "m.safetensors"
    with megamask.swap(model, path):
        shown = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    applied = megamask.apply_masks(load(run / "hf"), path)
    assert all(torch.equal(one, shown[name]) for name, one in applied.state_dict().items())
    applied.save_pretrained(run / "out")
    files, masks = load_file(run / "out" / "model.safetensors"), megamask.load_masks(path)
    for name, tensor in load_file(run / "hf" / "model.safetensors").items():
        mask = masks.get(name.removesuffix(".weight"))
        expected = tensor if mask is None else tensor.masked_fill(~mask, 0.0)
        assert torch.equal(files[name], expected), name
    assert any(not torch.equal(shown[name], dense[name]) for name in dense)


@pytest.mark.parametrize("place", ["mlp", "mlp.experts", "layer"])
def test_wrappers_within_a_model_change_no_name(run: Path, place: str) -> None:
    plain, wrapped = load(run / "hf"), load(run / "hf")
    for layer in range(len(wrapped.model.layers)):
        whole = wrapped.model.layers[layer]
        if place == "layer":
            wrapped.model.layers[layer] = torch.compile(whole)
            continue
        if place == "mlp.experts" and not hasattr(whole.mlp, "experts"):
            continue  # a dense layer
        owner, _, leaf = place.rpartition(".")
        held = whole.get_submodule(owner)
        setattr(held, leaf, checkpoint_wrapper(getattr(held, leaf)))
    megamask.apply_masks(plain, run / "m.safetensors")
    with megamask.swap(wrapped, run / "m.safetensors"):
        shown = {unwrapped(name): one for name, one in wrapped.state_dict().items()}
        assert shown.keys() == plain.state_dict().keys()
        assert all(torch.equal(one, shown[name]) for name, one in plain.state_dict().items())


def test_another_model_is_refused(run: Path) -> None:
    model = load(run / "hf")
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj"):
            parameter.data[0] += 1.0
    with pytest.raises(ArtifactError, match="another base model"):
        megamask.apply_masks(model, run / "m.safetensors")


def test_files_that_hold_experts_together_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "hf" / "config.json", tmp_path)
    state = {name: tensor.contiguous() for name, tensor in load(run / "hf").state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"misses tensors: .*experts\.0\..*unknown.*experts"):
        open_checked(tmp_path)
