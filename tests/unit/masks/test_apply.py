"""apply_masks and the verb inspect on a tiny transformers model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megamask.config import build_config
from megamask.errors import ArtifactError, ConfigError
from megamask.masks.apply import apply_masks
from megamask.masks.file import load_masks, save_masks
from megamask.masks.verify import verify
from megamask.sparsity.pattern import Pattern
from megamask.verbs.inspect import run
from megamask.verbs.own_arguments import InspectArguments
from megamask.weights.fingerprint import fingerprint_model, model_linears

P24 = Pattern(2, 4)


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 50, **changes}))


def save_for(model: LlamaForCausalLM, path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    masks = {name: P24.best(linear.weight.abs()) for name, linear in model_linears(model).items()}
    masks.update(changes)
    save_masks(path, masks, P24, fingerprint=fingerprint_model(model), method="magnitude")
    return masks


def test_pruned_places_are_positive_zero_and_the_rest_is_untouched(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    masks = save_for(model, tmp_path / "m")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert apply_masks(model, tmp_path / "m") is model
    for name, tensor in model.state_dict().items():
        mask = masks.get(name.removesuffix(".weight"))
        if mask is None:
            assert torch.equal(tensor, dense[name])
            continue
        assert torch.equal(tensor[mask], dense[name][mask])
        assert bool((tensor.view(torch.int16)[~mask] == 0).all())  # bits: +0.0
        product = dense[name] * mask
        assert torch.signbit(product[~mask]).any()  # what multiplying would have left: -0.0


def test_linears_without_a_mask_stay_dense(tmp_path: Path) -> None:
    model = tiny_model()
    name = "model.layers.0.mlp.down_proj"
    masks = {name: P24.best(model.get_submodule(name).weight.abs())}
    save_masks(tmp_path / "m", masks, P24, fingerprint=fingerprint_model(model), method="x")
    apply_masks(model, load_masks(tmp_path / "m"))
    assert (model.get_submodule(name).weight == 0).double().mean() == 0.5
    assert (model.model.layers[0].mlp.up_proj.weight != 0).all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_model(seed=1), "another base model"),
        (lambda: tiny_model(intermediate_size=128), "shape"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), "no linear of the model"),
    ],
)
def test_other_models_are_refused_and_not_touched(
    tmp_path: Path, other: Callable[[], torch.nn.Module], message: str
) -> None:
    save_for(tiny_model(), tmp_path / "m")
    model = other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=message):
        apply_masks(model, tmp_path / "m")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_changed_weights_are_accepted_on_request(tmp_path: Path) -> None:
    save_for(tiny_model(), tmp_path / "m")
    apply_masks(tiny_model(seed=1), tmp_path / "m", check_fingerprint=False)


def test_a_corrupt_file_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    save_for(model, tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m").write_bytes(bytes(data))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError, match="corrupt"):
        apply_masks(model, tmp_path / "m")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_inspect_prints_what_is_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf")
    save_for(model, tmp_path / "masks" / "learned.safetensors")
    run(build_config({"run_dir": str(tmp_path)}), InspectArguments())
    out = capsys.readouterr().out
    for fact in (
        "magnitude",
        "2:4 (6 candidates",
        "density          0.5",
        "linears          7",
        "bits per weight",
        "belongs to",
    ):
        assert fact in out
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**described, "my_note": 3}))
    with pytest.raises(ConfigError, match=r"model\.ignore_keys=\[my_note\]"):
        verify(tmp_path / "masks" / "learned.safetensors", tmp_path / "hf")
    verify(tmp_path / "masks" / "learned.safetensors", tmp_path / "hf", ["my_note"])
    tiny_model(seed=1).save_pretrained(tmp_path / "hf")
    with pytest.raises(ArtifactError, match="another base model"):
        verify(tmp_path / "masks" / "learned.safetensors", tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"export\.mask"):
        config = build_config({"run_dir": str(tmp_path), "export": {"mask": "dense"}})
        run(config, InspectArguments())
