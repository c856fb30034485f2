"""config.json files in the spellings in which models of each family were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamask.errors import ConfigError
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.family import Layer, Norm, Rope

COMMON = {"initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.41.0"}


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    **sizes(4096, 14336, 32, 32, 8, 32000),
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
QWEN25 = {
    "model_type": "qwen2",
    **sizes(3584, 18944, 28, 28, 4, 152064),
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3 = {
    "model_type": "qwen3",
    **sizes(4096, 12288, 36, 32, 8, 151936),
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
PHI3 = {
    "model_type": "phi3",
    **sizes(3072, 8192, 32, 32, 32, 32064),
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
STARCODER2 = {
    "model_type": "starcoder2",
    **sizes(3072, 12288, 30, 24, 2, 49152),
    "attention_dropout": 0.1,
    "attention_softmax_in_fp32": True,
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "sliding_window": 4096,
    "use_bias": True,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 50304,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}
GEMMA2 = {
    "model_type": "gemma2",
    **sizes(2304, 9216, 26, 8, 4, 256000),
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    **sizes(1152, 6912, 26, 4, 1, 262144),
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
MINITRON = {
    "model_type": "nemotron",
    **sizes(3072, 9216, 32, 24, 8, 256000),
    "hidden_act": "relu2",
    "kv_channels": 128,
    "max_position_embeddings": 4096,
    "norm_eps": 1e-05,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "mistral": MISTRAL,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "starcoder2": STARCODER2,
    "pythia": PYTHIA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "minitron": MINITRON,
}


def read(tmp_path: Path, config: dict[str, Any], **changes: Any) -> Architecture:
    whole = {**COMMON, **config, **changes}
    written = {key: value for key, value in whole.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(written))
    return read_architecture(tmp_path)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_files_are_read_and_an_unknown_key_is_not(tmp_path: Path, name: str) -> None:
    arch = read(tmp_path, PUBLISHED[name])
    assert arch.family == PUBLISHED[name]["model_type"]
    with pytest.raises(ConfigError, match=r"config\.json: shortcut_gain.*ignore_keys"):
        read(tmp_path, PUBLISHED[name], shortcut_gain=0.5)
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config"):
        read(tmp_path, PUBLISHED[name], quantization_config={"bits": 4})


def test_null_is_not_absent(tmp_path: Path) -> None:
    """Mistral 7B v0.1 has a window, v0.2 says null, and an absent key means the class's 4096."""
    assert set(read(tmp_path, MISTRAL, sliding_window=4096).layers) == {Layer(0, 4096)}
    assert set(read(tmp_path, MISTRAL, sliding_window=None).layers) == {Layer(0, None)}
    assert set(read(tmp_path, MISTRAL).layers) == {Layer(0, 4096)}


def test_absent_keys_have_the_defaults_of_their_class(tmp_path: Path) -> None:
    assert read(tmp_path, GEMMA3).tied and read(tmp_path, GEMMA2).tied
    assert read(tmp_path, STARCODER2).tied and not read(tmp_path, QWEN25).tied
    assert read(tmp_path, QWEN3, head_dim="absent", hidden_size=5120).head_dim == 128
    assert read(tmp_path, PHI3, rms_norm_eps="absent").norm == Norm("rms", 1e-5)
    assert read(tmp_path, MISTRAL, rms_norm_eps="absent").norm == Norm("rms", 1e-6)
    assert read(tmp_path, PYTHIA, rotary_pct="absent").ropes == (Rope(10000.0, None, 0.25),)
    gemma = read(tmp_path, GEMMA3, rope_theta="absent", rope_local_base_freq="absent")
    assert gemma.ropes == (Rope(1e6), Rope(1e4))


def test_a_window_counts_only_where_it_is_used(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN25).layers == ()
    used = read(tmp_path, QWEN25, use_sliding_window=True, max_window_layers=20)
    assert [layer.window for layer in used.layers] == [None] * 20 + [131072] * 8


def test_gemma_3_scales_the_rotation_of_its_full_layers_alone(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = read(tmp_path, GEMMA3, rope_scaling=scaling)
    assert old.ropes == (Rope(1e6, {"type": "linear", "factor": 8.0}), Rope(1e4))
    assert [layer.rope for layer in old.layers[:7]] == [1, 1, 1, 1, 1, 0, 1]
    assert {layer.window for layer in old.layers if layer.rope == 0} == {None}
    names = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    new = read(
        tmp_path,
        GEMMA3,
        **dict.fromkeys(names, "absent"),
        rope_parameters={
            "full_attention": {**scaling, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=[
            "full_attention" if one.rope == 0 else "sliding_attention" for one in old.layers
        ],
        _sliding_window_pattern=6,
    )
    assert new == old


def test_what_a_family_does_not_build_is_refused_by_name(tmp_path: Path) -> None:
    longrope = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (PHI3, {"rope_scaling": longrope}, "rope_scaling.rope_type"),
        (PHI3, {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map"),
        (MINITRON, {"hidden_act": "silu"}, "hidden_act"),
        (MINITRON, {"kv_channels": 64}, "kv_channels"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (PYTHIA, {"hidden_act": "relu"}, "hidden_act"),
        (PYTHIA, {"rotary_pct": 1.5}, "rotary_pct"),
        (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        (MISTRAL, {"sliding_window": -1}, "sliding_window"),
    ]
    for config, changes, key in wrong:
        with pytest.raises(ConfigError, match=rf"config\.json: {key}"):
            read(tmp_path, config, **changes)
