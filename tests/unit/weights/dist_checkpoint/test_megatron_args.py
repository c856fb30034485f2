"""What a checkpoint tells about its model is compared with config.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.errors import ArtifactError
from megamask.safe_checkpoint import COMMON
from megamask.weights.architecture import parsed_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.megatron_args import (
    beyond_gpt_model,
    disagreements,
    flags_beside,
    megatron_args,
)
from tests.unit.weights.dist_checkpoint.checkpoints import CONFIG, refusal, write

ROPE = {"position_embedding_type": "rope", "use_rope_scaling": True, "rope_scaling_factor": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_the_scaling_of_the_rotary_embedding_is_compared(hf: Path, tmp_path: Path) -> None:
    """What the arguments say is compared with each scaling of config.json, and written so."""
    plain = ROPE | {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}
    stretched = plain | {"rotary_seq_len_interpolation_factor": 2}
    cases: list[tuple[dict[str, Any] | None, dict[str, Any], list[str]]] = [
        (None, plain, []),
        (None, ROPE, ["use_rope_scaling"]),
        (None, stretched, ["rotary_seq_len_interpolation_factor"]),
        (LLAMA3, ROPE, []),
        (LLAMA3, plain, ["use_rope_scaling"]),
        (LLAMA3, ROPE | {"rope_scaling_factor": 32.0}, ["rope_scaling_factor"]),
        (LLAMA3, ROPE | {"position_embedding_type": "yarn"}, ["position_embedding_type"]),
        (LINEAR, stretched, []),
        (LINEAR, ROPE, ["use_rope_scaling"]),
    ]
    flags = {
        "null": "",
        "llama3": " --use-rope-scaling --rope-scaling-factor 8.0",
        "linear": " --rotary-seq-len-interpolation-factor 2",
    }
    for scaling, told, expected in cases:
        (hf / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": scaling}))
        arch = BaseModel(hf).architecture()
        torch.save({"args": argparse.Namespace(**told)}, tmp_path / COMMON)
        assert [name for name, _, _ in disagreements(tmp_path, arch)] == expected
        torch.save({"args": argparse.Namespace(**megatron_args(arch, 128))}, tmp_path / COMMON)
        assert not list(disagreements(tmp_path, arch))
        kind = "null" if scaling is None else scaling["rope_type"]
        beside = "--use-checkpoint-args --norm-epsilon 1e-05" + flags[kind]
        assert " ".join(flags_beside(arch)) == beside
        assert not beyond_gpt_model(arch)


@pytest.mark.parametrize(
    ("scaling", "name"),
    [
        (LLAMA3 | {"high_freq_factor": 2.0}, "high_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": 2048}, "original_max_position_embeddings"),
        (LINEAR | {"factor": 2.5}, None),
    ],
)
def test_a_scaling_that_the_arguments_do_not_express_is_told(
    hf: Path, tmp_path: Path, scaling: dict[str, Any], name: str | None
) -> None:
    """Megatron-LM has the constants of Llama 3.1 in its code, and takes whole linear factors."""
    (hf / "config.json").write_text(json.dumps(CONFIG | {"rope_scaling": scaling}))
    arch = BaseModel(hf).architecture()
    assert "this scaling of the rotary embedding" in beyond_gpt_model(arch)
    if name is not None:
        torch.save({"args": argparse.Namespace(**ROPE)}, tmp_path / COMMON)
        (found,) = disagreements(tmp_path, arch)
        assert found[0] == name and found[2] == scaling[name]


WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
QWEN3 = {"model_type": "qwen3", "head_dim": 4, "use_sliding_window": True, **WINDOWED}
GPT_NEOX = {"model_type": "gpt_neox", "hidden_act": "gelu", "num_key_value_heads": 4}
GPT_NEOX["rotary_pct"] = 0.5  # 2 of the 4 dimensions of a head
BRIDGE = "megatron.core.activations."


@pytest.mark.parametrize(
    ("changes", "told", "expected"),
    [
        ({}, {"swiglu": True, "squared_relu": False, "qk_layernorm": False}, []),
        ({}, {"swiglu": False, "squared_relu": True}, ["swiglu", "squared_relu"]),
        ({}, {"qk_layernorm": True}, ["qk_layernorm"]),
        ({}, {"bias_gelu_fusion": True}, []),  # a default, which biases alone switch on
        ({}, {"softmax_scale": 0.5, "window_size": None, "no_rope_freq": None}, []),
        ({}, {"softmax_scale": 0.25, "attn_logit_softcapping": 50.0}, "both"),
        ({}, {"window_size": (64, 0)}, ["window_size"]),
        ({}, {"window_size": (-1, 0)}, []),
        ({}, {"no_rope_freq": 2}, ["no_rope_freq"]),
        ({}, {"no_rope_freq": [0, 0]}, []),
        ({}, {"experimental_attention_variant": "dsa"}, ["experimental_attention_variant"]),
        ({}, {"activation_func": {"_target_": "torch.nn.functional.silu"}}, []),
        ({}, {"activation_func": BRIDGE + "fast_gelu"}, ["activation_func"]),
        ({}, {"gated_linear_unit": False}, ["gated_linear_unit"]),
        (QWEN3, {"window_size": [7, 0], "window_attn_skip_freq": 2, "qk_layernorm": True}, []),
        (QWEN3, {"window_size": 8, "window_attn_skip_freq": [1, 0]}, []),
        (QWEN3, {"window_size": [7, 0]}, ["window_attn_skip_freq"]),
        (QWEN3, {"window_size": [7, 0], "window_attn_skip_freq": [0, 1]}, "skips"),
        (QWEN3, {"window_size": [64, 0], "window_attn_skip_freq": 2}, ["window_size"]),
        (QWEN3, {"window_size": [-1, 0]}, ["window_size"]),
        (QWEN3, {"window_size": None, "qk_layernorm": False}, ["qk_layernorm"]),
        (GPT_NEOX, {"swiglu": False, "bias_gelu_fusion": False}, []),
        (GPT_NEOX, {"swiglu": False, "bias_gelu_fusion": True}, ["bias_gelu_fusion"]),
        (GPT_NEOX | {"hidden_act": "gelu_new"}, {"bias_gelu_fusion": True}, []),
        (GPT_NEOX | {"hidden_act": "gelu_new"}, {"activation_func": BRIDGE + "fast_gelu"}, []),
    ],
)
def test_the_arithmetic_of_a_layer_is_compared(
    tmp_path: Path, changes: dict[str, Any], told: dict[str, Any], expected: list[str] | str
) -> None:
    """The tensors show none of it."""
    names = {
        "both": ["softmax_scale", "attn_logit_softcapping"],
        "skips": ["window_attn_skip_freq"],
    }
    arch = parsed_architecture(CONFIG | changes, tmp_path / "config.json", ["rms_norm_eps"])
    torch.save({"args": argparse.Namespace(**told)}, tmp_path / COMMON)
    found = [name for name, _, _ in disagreements(tmp_path, arch)]
    assert found == (names[expected] if isinstance(expected, str) else expected)


def test_a_written_checkpoint_agrees_with_every_family(tmp_path: Path) -> None:
    for config in (CONFIG, CONFIG | QWEN3, CONFIG | GPT_NEOX):
        arch = parsed_architecture(config, tmp_path / "config.json", ["rms_norm_eps"])
        torch.save({"args": argparse.Namespace(**megatron_args(arch, 128))}, tmp_path / COMMON)
        assert not list(disagreements(tmp_path, arch))


def test_every_ignored_setting_is_named(hf: Path, tensors: dict[str, Any], tmp_path: Path) -> None:
    """A key lets its own setting through, and no other."""
    args = argparse.Namespace(norm_epsilon=1e-6, rotary_interleaved=True, **ROPE)
    folder = write(tmp_path / "x", tensors, args)
    keys = [f"megatron.{name}" for name in ("norm_epsilon", "rotary_interleaved")]
    with pytest.raises(ArtifactError, match="use_rope_scaling"):
        BaseModel(hf, folder, keys).open()
    BaseModel(hf, folder, [*keys, "megatron.use_rope_scaling"]).open()


def test_rows_beyond_the_vocabulary_are_padding_alone(
    hf: Path, tensors: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """config.json says 10 tokens, and the checkpoint has 12 rows."""
    for name, size in (("vocab_size", 11), ("padded_vocab_size", 9)):
        folder = write(tmp_path / "x", tensors, argparse.Namespace(**{name: size}))
        assert f"was trained with {name} = {size}; config.json says 10" in refusal(hf, folder)
    told = argparse.Namespace(vocab_size=9, padded_vocab_size=12)
    with caplog.at_level("INFO"), BaseModel(hf, write(tmp_path / "x", tensors, told)).open():
        assert "2 rows beyond the vocabulary of config.json are left out" in caplog.text
    tensors = {key: one[:10] if len(one) == 12 else one for key, one in tensors.items()}
    caplog.clear()
    with caplog.at_level("INFO"), BaseModel(hf, write(tmp_path / "x", tensors, told)).open():
        assert "rows beyond" not in caplog.text
