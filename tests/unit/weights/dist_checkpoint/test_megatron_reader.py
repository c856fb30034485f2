"""Checkpoints that are none, or of another model: an error names key, value and fix."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import load_config
from megamask.errors import ArtifactError, ConfigError
from megamask.safe_checkpoint import told_args
from megamask.verbs import convert, export
from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.checkpoint_folder import FORMAT, TRACKER
from megamask.weights.dist_checkpoint.megatron_names import stacked_name
from tests.unit.weights.dist_checkpoint.checkpoints import LAYER, refusal, write


def test_places_of_a_checkpoint(hf: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The folder itself, Megatron's ``--save`` folder, a release, and NeMo's folder."""
    folder = write(tmp_path / "save" / "iter_0000020", tensors)
    (tmp_path / "save" / TRACKER).write_text("20\n")
    shutil.copytree(folder, tmp_path / "nemo" / "weights")
    shutil.copytree(folder, tmp_path / "released" / "release")
    (tmp_path / "released" / TRACKER).write_text("release")
    prints = {
        BaseModel(hf, place).fingerprints().exact
        for place in (folder, tmp_path / "save", tmp_path / "nemo", tmp_path / "released")
    }
    assert len(prints) == 1


def test_a_training_state_is_not_the_model(
    hf: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    beside = {
        "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight": torch.ones(3),
        "chained_0.optimizer.state.fp32_param.output_layer.weight": torch.ones(3),
        "rng_state/shard_0.0_1.1": "an object",
        "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_2": "an object",
        "decoder.rotary_pos_emb.inv_freq": torch.ones(2),
    }
    with BaseModel(hf, write(tmp_path / "x", {**tensors, **beside})).open() as source:
        found = source.tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(found, tensors[LAYER])


Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(LAYER), rf"misses tensors: {LAYER}\."),
    "extra": (
        lambda t: t.update({"decoder.layers.0.self_attention.q_layernorm.weight": torch.ones(4)}),
        r"has unknown tensors: decoder\.layers\.0\.self_attention\.q_layernorm\.weight\.",
    ),
    "experts": (
        lambda t: t.update({"decoder.layers.mlp.experts.experts.linear_fc1.weight": torch.ones(1)}),
        "has unknown tensors: decoder.layers.mlp.experts",
    ),
    "shape": (
        lambda t: t.update({LAYER: torch.ones(16, 20)}),
        rf"wrongly shaped tensors: {LAYER} \(16, 20\), expected \(16, 24\)",
    ),
    "vocabulary": (
        lambda t: t.update({"output_layer.weight": torch.ones(9, 16)}),
        r"output_layer\.weight \(9, 16\), expected \(10, 16\)",
    ),
    "another vocabulary": (
        lambda t: t.update({"output_layer.weight": torch.ones(9000, 16)}),
        r"output_layer\.weight \(9000, 16\), expected \(10, 16\)",
    ),
    "bias": (
        lambda t: t.update({"decoder.layers.0.self_attention.linear_qkv.bias": torch.ones(32)}),
        r"has unknown tensors: decoder\.layers\.0\.self_attention\.linear_qkv\.bias",
    ),
    "two models": (
        lambda t: t.update({"ema.embedding.word_embeddings.weight": torch.ones(12, 16)}),
        "holds several models, named '', 'ema.'",
    ),
    "not a model": (lambda t: [t.pop(key) for key in list(t)], "misses tensors: embedding"),
}


@pytest.mark.parametrize("fault", list(WRONG))
def test_another_model_is_refused(
    fault: str, hf: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    change, message = WRONG[fault]
    change(tensors)
    said = refusal(hf, write(tmp_path / "x", tensors))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert "correct model.hf or model.megatron" in said


def test_too_few_stacked_layers(hf: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    key, _ = stacked_name(LAYER)
    for layer in (0, 1):
        tensors.pop(LAYER.replace("1", str(layer), 1))
    tensors[key] = torch.ones(3, 16, 24)
    said = refusal(hf, write(tmp_path / "x", tensors))
    assert f"{key} (3, 16, 24), expected (2, 16, 24)" in said


def test_other_formats_are_refused(hf: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    assert "model.megatron = " in refusal(hf, tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no Megatron checkpoint: .metadata is missing" in refusal(hf, empty)
    (empty / TRACKER).write_text("soon")
    assert "holds 'soon', neither the number of an iteration nor release" in refusal(hf, empty)
    (empty / TRACKER).write_text("5")
    assert "iter_0000005: holds no Megatron checkpoint" in refusal(hf, empty)
    (empty / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    said = refusal(hf, empty)
    assert (
        "has the format torch (mp_rank_00)" in said and "--ckpt-convert-format torch_dist" in said
    )
    zarr = write(tmp_path / "zarr", tensors)
    (zarr / FORMAT).write_text('{"sharded_backend": "zarr"}')
    assert "has the format 'zarr'; only torch_dist is read" in refusal(hf, zarr)


class Payload:
    """Unpickled, it makes the folder that it was given."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("new_form", [False, True])
def test_the_arguments_of_training_are_compared(
    new_form: bool, hf: Path, tensors: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing that the file names runs, and what is not told is not compared."""
    target = tmp_path / "made-by-the-payload"
    right: dict[str, Any] = {"num_layers": 2, "norm_epsilon": 1.0000000e-05, "rotary_base": 10000}
    right |= {"num_query_groups": 2, "position_embedding_type": "rope", "kv_channels": None}
    args = argparse.Namespace(**right, model_type=Payload(target), dtype=torch.bfloat16, list=[1])
    folder = write(tmp_path / "x", tensors, args, new_form)
    assert told_args(folder)["num_layers"] == 2
    with BaseModel(hf, folder).open():
        assert not target.exists()
    for name, there, here in (
        ("norm_epsilon", 1e-6, 1e-5),
        ("rotary_base", 500000, 10000.0),
        ("apply_layernorm_1p", True, False),
        ("rotary_interleaved", True, False),
        ("normalization", "LayerNorm", "RMSNorm"),
    ):
        told = argparse.Namespace(**(right | {name: there}))
        said = refusal(hf, write(tmp_path / "x", tensors, told, new_form))
        assert f"was trained with {name} = {there!r}; config.json says {here!r}" in said
        assert f"model.ignore_keys=[megatron.{name}]" in said
        BaseModel(hf, tmp_path / "x", [f"megatron.{name}"]).open()


def test_the_config_of_bridge_is_compared(
    hf: Path, tensors: dict[str, Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "x", tensors)
    (folder / "run_config.yaml").write_text("model:\n  layernorm_epsilon: 1.0e-06\n")
    assert "layernorm_epsilon = 1e-06; config.json says 1e-05" in refusal(hf, folder)
    for text in (
        "model:\n  layernorm_epsilon: 1.0e-05\n",
        "model: 3",
        "- 1",
        "x: !!python/name:os",
    ):
        (folder / "run_config.yaml").write_text(text)
        BaseModel(hf, folder).open()


def test_verbs_refuse_before_they_write(hf: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    del tensors[LAYER]
    folder = write(tmp_path / "x", tensors)
    words = [f"run_dir={tmp_path / 'run'}", f"model.hf={hf}", f"model.megatron={folder}"]
    for run in (convert.run, export.run):
        with pytest.raises(ArtifactError, match="misses tensors"):
            run(load_config(None, [*words, "device=cpu", "export.mask=dense"]))
    with pytest.raises(ConfigError, match=r"export\.out = .*a folder other than model\.megatron"):
        export.run(load_config(None, [*words, f"export.out={folder}"]))
    assert not [one for one in (tmp_path / "run").rglob("*") if one.is_file()]
