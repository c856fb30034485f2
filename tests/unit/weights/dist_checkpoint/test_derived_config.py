"""The architecture of a checkpoint without a config.json is the one that its settings tell."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megamask.config import load_config
from megamask.errors import ArtifactError, ConfigError
from megamask.safe_checkpoint import COMMON
from megamask.verbs import export
from megamask.weights.architecture import parsed_architecture, read_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.checkpoint_folder import BRIDGE_TRACKER, RUN_CONFIG
from megamask.weights.dist_checkpoint.derived_config import PLAIN, derived_config
from megamask.weights.dist_checkpoint.megatron_args import beyond_gpt_model, megatron_args
from megamask.weights.dist_checkpoint.megatron_names import hybrid_name
from megamask.weights.family import Architecture, Norm, Rope
from tests.parity import variants
from tests.parity.variants import VARIANTS
from tests.unit.weights.dist_checkpoint.checkpoints import CONFIG, write

# What Megatron-LM's args say of the small Llama of this folder; seq_length is of training.
LLAMA: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "max_position_embeddings": 32,
    "seq_length": 8,
    "padded_vocab_size": 12,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "swiglu": True,
    "squared_relu": False,
    "bias_gelu_fusion": False,
    "untie_embeddings_and_output_weights": True,
    "bf16": True,
    "fp16": False,
    "num_experts": None,
    "window_size": None,
}
PLAIN_LLAMA = Architecture(
    "llama", 2, 16, 24, 4, 2, 4, 12, 32, False, Norm("rms", 1e-5), dtype=torch.bfloat16
)
LAYER_NORM = {"normalization": "LayerNorm", "swiglu": False}
BIASED = {"add_bias_linear": True, "bias_gelu_fusion": True}
SCALED = {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "rotary_base": 500000}
LLAMA3 = Rope(
    5e5,
    {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
ALL_BIASES = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
PLAIN_GPT: dict[str, Any] = {"norm": Norm("layer", 1e-5, bias=True), "gated": False, **ALL_BIASES}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "llama 3.1": (SCALED, {"ropes": (LLAMA3,)}),
    "llama stretched": (
        {"rotary_seq_len_interpolation_factor": 2},
        {"ropes": (Rope(1e4, {"type": "linear", "factor": 2.0}),)},
    ),
    "llama with biases, heads alone": (
        {"add_bias_linear": True, "group_query_attention": False, "num_query_groups": 1},
        {"kv_heads": 4, **ALL_BIASES},
    ),
    "qwen2": (
        {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
        {"family": "qwen2", "attention_bias": True, "tied": True},
    ),
    "qwen3": (
        {"qk_layernorm": True, "kv_channels": 8},
        {"family": "qwen3", "qk_norm": "head", "head_dim": 8},
    ),
    "nemotron": (
        LAYER_NORM | {"apply_layernorm_1p": True, "squared_relu": True, "rotary_percent": 0.5},
        {
            "family": "nemotron",
            "norm": Norm("layer", 1e-5, plus_one=True, bias=True),
            "activation": "relu2",
            "gated": False,
            "ropes": (Rope(share=0.5),),
        },
    ),
    "the GPT-3 shapes of MaskLLM": (
        {"normalization": "LayerNorm"},
        {"family": "stablelm", "norm": Norm("layer", 1e-5, bias=True)},
    ),
    "starcoder2": (
        LAYER_NORM | BIASED,
        {"family": "starcoder2", **PLAIN_GPT, "activation": "gelu_tanh"},
    ),
    "gpt_neox": (
        LAYER_NORM
        | BIASED
        | {"rotary_percent": 0.5, "group_query_attention": False, "bias_gelu_fusion": False},
        {
            "family": "gpt_neox",
            **PLAIN_GPT,
            "activation": "gelu",
            "ropes": (Rope(share=0.5),),
            "kv_heads": 4,
        },
    ),
    "gpt2": (
        LAYER_NORM
        | BIASED
        | {"position_embedding_type": "learned_absolute", "group_query_attention": False},
        {"family": "gpt2", **PLAIN_GPT, "activation": "gelu_tanh", "ropes": (), "kv_heads": 4},
    ),
}


def told(folder: Path, settings: dict[str, Any], new_form: bool = False) -> Path:
    return write(folder, {"x": torch.ones(1)}, argparse.Namespace(**settings), new_form)


def config_of(folder: Path) -> tuple[dict[str, Any], Architecture]:
    config = derived_config(folder)
    arch = parsed_architecture(json.loads(json.dumps(config)), folder / "config.json")
    if not any(layer.window for layer in arch.layers):
        arch = replace(arch, layers=())
    return config, arch


@pytest.mark.parametrize("name", list(MODELS))
def test_settings_become_the_config_of_a_family(name: str, tmp_path: Path) -> None:
    settings, facts = MODELS[name]
    config, found = config_of(told(tmp_path / "x", LLAMA | settings, new_form="llama" in name))
    assert found == replace(PLAIN_LLAMA, **facts)
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**config)
    assert theirs.num_hidden_layers == 2 and theirs.vocab_size == 12
    width = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert width == found.head_dim


@pytest.mark.parametrize("name", list(MODELS))
def test_what_an_export_tells_is_read_again(name: str, tmp_path: Path) -> None:
    settings, _ = MODELS[name]
    _, arch = config_of(told(tmp_path / "x", LLAMA | settings))
    args = megatron_args(arch, arch.vocab)
    assert not beyond_gpt_model(arch)
    _, again = config_of(told(tmp_path / "y", args))
    assert again == arch


# Variants of the table of parity that Megatron-LM has arguments for.
PLAIN_VARIANTS = ("qwen2 tied", "qwen3", "stablelm", "nemotron", "gpt_neox serial", "gpt2")
MISSING = [
    "hidden_size",
    "num_layers",
    "ffn_hidden_size",
    "normalization",
    "norm_epsilon",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "swiglu",
    "add_bias_linear",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_setting_that_is_not_told_is_named(name: str, tmp_path: Path) -> None:
    """Nothing is guessed."""
    folder = told(tmp_path / "x", {key: one for key, one in LLAMA.items() if key != name})
    shown = {"norm_epsilon": "layernorm_epsilon", "untie_embeddings_and_output_weights": "share_"}
    with pytest.raises(ArtifactError, match=f"does not tell {shown.get(name, name)}.*config.json"):
        derived_config(folder)


REFUSED: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_experts": 8,
    "window_size": [128, 0],
    "softmax_type": "learnable",
    "apply_residual_connection_post_layernorm": True,
    "quick_geglu": True,
    "no_rope_freq": 4,
    "mtp_num_layers": 1,
    "rotary_interleaved": True,
    "position_embedding_type": "yarn",
    "normalization": "L2Norm",
    "hybrid_layer_pattern": "M*-",
    "hidden_size": "16",
    "num_query_groups": True,
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_setting_that_no_config_expresses_is_named(name: str, tmp_path: Path) -> None:
    value = REFUSED[name]
    folder = told(tmp_path / "x", LLAMA | {name: value})
    with pytest.raises(ArtifactError, match=f"was trained with {name} = .*model.hf at its folder"):
        derived_config(folder)
    assert name in PLAIN or not isinstance(PLAIN.get(name), bool)


ODD: list[Any] = [None, -1, 0, 2.5, "x", "", [1], {"a": 1}, True, float("nan"), 10**30]


def test_any_value_is_a_model_or_a_refusal(tmp_path: Path) -> None:
    accepted = 0
    for name in LLAMA:
        for value in ODD:
            told = argparse.Namespace(**LLAMA | {name: value})
            torch.save({"args": told}, tmp_path / COMMON)
            try:
                derived_config(tmp_path)
                accepted += 1
            except ArtifactError as error:
                assert str(tmp_path) in str(error)
    assert 0 < accepted < len(LLAMA) * len(ODD) / 2


def test_a_model_of_no_family_is_refused(tmp_path: Path) -> None:
    """A gated GELU unit of biases would be; so would a squared ReLU behind an RMSNorm."""
    for odd in ({"swiglu": False, "squared_relu": True}, {"apply_layernorm_1p": True}):
        with pytest.raises(ArtifactError, match="has a model that no family expresses"):
            derived_config(told(tmp_path / "x", LLAMA | odd))
    with pytest.raises(ArtifactError, match=f"no args and no {RUN_CONFIG}"):
        derived_config(write(tmp_path / "y", {"x": torch.ones(1)}))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_what_is_more_than_a_gpt_model_is_told(name: str, tmp_path: Path) -> None:
    """Every variant of the table of parity: its own config from its arguments, or a refusal."""
    variants.config_of(VARIANTS[name]).save_pretrained(tmp_path)
    arch = replace(read_architecture(tmp_path), dtype=torch.float32)
    torch.save({"args": argparse.Namespace(**megatron_args(arch, arch.vocab))}, tmp_path / COMMON)
    lacking = beyond_gpt_model(arch)
    assert bool(lacking) == (name not in PLAIN_VARIANTS), lacking
    if lacking:
        with pytest.raises(ArtifactError, match=f"beyond_gpt_model = .*{lacking[0]}"):
            derived_config(tmp_path)
    else:
        found = config_of(tmp_path)[1]
        assert replace(found, family="", layers=()) == replace(arch, family="", layers=())


def test_the_run_config_of_bridge(tmp_path: Path) -> None:
    """The fields of TransformerConfig lie in the section ``model``, or one level down."""
    outer = {
        "_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig",
        "vocab_size": 10,
        "seq_length": 32,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rope_scaling": False,
        "seq_len_interpolation_factor": None,
        "hf_model_id": "somebody/llama",
    }
    inner = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 4,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "bf16": True,
        "window_size": None,
    }
    folder = write(tmp_path / "iter_0000000", {"x": torch.ones(1)})
    for model in (outer | {"transformer": inner}, inner | outer):
        (folder / RUN_CONFIG).write_text(yaml.safe_dump({"model": model}))
        assert config_of(folder)[1] == replace(PLAIN_LLAMA, vocab=10)
    for change, problem in (
        ({"activation_func": "quick_gelu"}, "activation_func = 'quick_gelu'"),
        ({"_target_": "megatron.bridge.models.gemma.Gemma3ModelProvider"}, "Gemma3ModelProvider"),
    ):
        (folder / RUN_CONFIG).write_text(yaml.safe_dump({"model": model | change}))
        with pytest.raises(ArtifactError, match=problem + ".*It was made from somebody/llama"):
            derived_config(folder)


def test_a_checkpoint_needs_no_config(
    hf: Path, tensors: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same tensors with and without, and a config.json beside what an export writes."""
    folder = write(tmp_path / "x", tensors, argparse.Namespace(**(LLAMA | {"bf16": False})))
    (hf / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 12}))
    alone = BaseModel(tmp_path / "none", folder)
    assert alone.architecture() == BaseModel(hf).architecture()
    assert alone.fingerprints() == BaseModel(hf, folder).fingerprints()
    with alone.config_file() as path:
        assert read_architecture(path) == alone.architecture()
    words = [f"run_dir={tmp_path / 'run'}", f"model.megatron={folder}", "export.mask=dense"]
    for form in ("hf", "megatron"):
        out = tmp_path / f"as-{form}"
        export.run(load_config(None, [*words, f"export.format={form}", f"export.out={out}"]))
        assert read_architecture(out) == alone.architecture()
    assert (
        BaseModel(tmp_path / "as-hf").fingerprints()
        == BaseModel(tmp_path / "none", tmp_path / "as-megatron").fingerprints()
        == alone.fingerprints()
    )


def test_a_setting_that_tensors_do_not_show_is_compared(
    hf: Path, tensors: dict[str, Any], tmp_path: Path
) -> None:
    args = argparse.Namespace(apply_residual_connection_post_layernorm=True, softmax_type="vanilla")
    with pytest.raises(ArtifactError, match="apply_residual_connection_post_layernorm = True"):
        BaseModel(hf, write(tmp_path / "x", tensors, args)).open()


def test_a_hybrid_model_is_read(hf: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    """Layers of attention and of feed-forward part in turn are the layers of a GPTModel."""
    hybrid = {hybrid_name(name): tensor for name, tensor in tensors.items()}
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in hybrid
    assert "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight" in hybrid
    args = {"hybrid_layer_pattern": "*-|*-", "num_layers": None, "is_hybrid_model": True}
    folder = write(tmp_path / "x", hybrid, argparse.Namespace(**LLAMA | {"bf16": False} | args))
    plain = write(tmp_path / "y", tensors)
    assert BaseModel(hf, folder).fingerprints() == BaseModel(hf, plain).fingerprints()
    assert derived_config(folder)["num_hidden_layers"] == 2
    del hybrid["decoder.layers.3.mlp.linear_fc2.weight"]
    with pytest.raises(ArtifactError, match="misses tensors: .*mlp.linear_fc2"):
        BaseModel(hf, write(tmp_path / "x", hybrid)).open()


def test_the_tracker_of_bridge_alone(hf: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "save" / "iter_0000020", tensors)
    tracker = tmp_path / "save" / BRIDGE_TRACKER
    torch.save({"step": torch.tensor(20), "consumed_train_samples": torch.tensor(9)}, tracker)
    assert len(BaseModel(hf, tmp_path / "save").fingerprints().exact) > 8
    for torn in (b"x", b""):
        tracker.write_bytes(torn)
        with pytest.raises(ArtifactError, match="holds no number of an iteration"):
            BaseModel(hf, tmp_path / "save").open()
    tracker.unlink()
    with pytest.raises((ArtifactError, ConfigError)):
        BaseModel(hf, tmp_path / "save").open()
