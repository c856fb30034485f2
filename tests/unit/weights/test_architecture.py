"""config.json -> Architecture: both spellings of transformers, and every refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, MixtralConfig

from megamask.errors import ArtifactError, ConfigError
from megamask.weights.architecture import Architecture, parsed_architecture, read_architecture
from megamask.weights.family import Norm, Rope

V4 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
    "rope_scaling": None,
    "attention_bias": False,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "attention_dropout": 0.1,
    "use_cache": True,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(tmp_path: Path, **changes: Any) -> Architecture:
    config = {key: value for key, value in {**V4, **changes}.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_architecture(tmp_path)


def rope(arch: Architecture) -> Rope:
    """The only rotary embedding."""
    (only,) = arch.ropes
    return only


def test_transformers_4_spelling(tmp_path: Path) -> None:
    arch = read(tmp_path)
    assert (
        arch.num_layers,
        arch.hidden,
        arch.ffn,
        arch.heads,
        arch.kv_heads,
        arch.head_dim,
        arch.vocab,
    ) == (2, 32, 64, 8, 2, 4, 50)
    assert (arch.tied, arch.norm, arch.ropes, arch.dtype) == (
        True,
        Norm("rms", 1e-5),
        (Rope(5e5),),
        torch.bfloat16,
    )


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_rope_scaling_in_both_spellings(tmp_path: Path, kind: str) -> None:
    expected = {"type": "llama3", **LLAMA3}
    assert rope(read(tmp_path, rope_scaling={kind: "llama3", **LLAMA3})).scaling == expected
    both = read(
        tmp_path,
        rope_theta="absent",
        rope_scaling="absent",
        rope_parameters={kind: "llama3", "rope_theta": 7.0, **LLAMA3},
    )
    assert rope(both) == Rope(7.0, expected)
    linear = rope(read(tmp_path, rope_scaling={kind: "linear", "factor": 2.0}))
    assert linear.scaling == {"type": "linear", "factor": 2.0}
    assert rope(read(tmp_path, rope_scaling={kind: "default"})).scaling is None


def test_what_transformers_5_writes_is_understood(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=8,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        dtype="float16",
    )
    config.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert arch.head_dim == 16 and arch.attention_bias and arch.attention_out_bias and arch.mlp_bias
    assert arch.ropes == (Rope(10000.0),) and arch.dtype == torch.float16 and arch.kv_heads == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("logit_softcap", 30.0),
        ("model_type", "mamba"),
        ("hidden_size", "absent"),
        ("num_key_value_heads", 3),
        ("torch_dtype", "float8_e4m3fn"),
        ("auto_map", {"AutoModel": "x.Y"}),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {key}"):
        read(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ({"type": "yarn", "factor": 2.0}, r"rope_scaling\.rope_type"),
        ({"type": "llama3", "factor": 2.0}, r"rope_scaling\.high_freq_factor"),
        ({"type": "linear", "factor": 2.0, "beta": 1}, r"rope_scaling\.beta"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_that_is_not_built_is_refused_by_name(
    tmp_path: Path, rope: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=key):
        read(tmp_path, rope_scaling=rope)


def test_what_transformers_computes_otherwise_is_refused(tmp_path: Path) -> None:
    """An odd number of rotated dimensions, and a cap that Gemma 3 has in its config alone."""
    neox = GPTNeoXConfig(
        hidden_size=80, num_attention_heads=4, num_hidden_layers=1, rotary_pct=0.25
    )
    with pytest.raises(ConfigError, match="rotates an odd number of the 20 dimensions"):
        parsed_architecture(neox.to_dict(), tmp_path)
    gemma = Gemma3TextConfig(num_hidden_layers=1).to_dict()
    assert parsed_architecture(gemma, tmp_path).attention_cap is None
    with pytest.raises(ConfigError, match="attn_logit_softcapping = 50.0: null for Gemma 3"):
        parsed_architecture({**gemma, "attn_logit_softcapping": 50.0}, tmp_path)


def test_more_experts_than_are_read_are_refused(tmp_path: Path) -> None:
    """Every verb would list the tensors of each of them first."""
    config = MixtralConfig(num_local_experts=2**30, num_hidden_layers=1).to_dict()
    with pytest.raises(ConfigError, match=r"num_local_experts = 1073741824: at most 4,096"):
        parsed_architecture(config, tmp_path)


def test_two_dtypes_that_disagree_are_refused(tmp_path: Path) -> None:
    """Older transformers read one of the keys and newer the other."""
    assert read(tmp_path, dtype="bfloat16", torch_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"torch_dtype = 'float16': disagrees with dtype"):
        read(tmp_path, dtype="bfloat16", torch_dtype="float16")


def test_disagreeing_rope_theta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disagrees"):
        read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1.0})


def test_a_truly_unknown_key_is_let_through_by_name_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"my_note.*model\.ignore_keys=\[my_note\]"):
        read(tmp_path, my_note="fine-tuned on Tuesday")
    plain = read_architecture(tmp_path, ["my_note"])
    assert plain == read(tmp_path)
    with pytest.raises(ConfigError):
        read(tmp_path, my_note=1, sliding_window=4096)
    with pytest.raises(ConfigError, match=r"config\.json: sliding_window"):
        read_architecture(tmp_path, ["my_note", "sliding_window"])  # known, and not built


def test_unknown_keys_that_are_null_are_harmless(tmp_path: Path) -> None:
    assert read(tmp_path, sliding_window=None, anything_else=None, quantization_config=None)


def test_keys_that_no_class_reads_change_nothing(tmp_path: Path) -> None:
    """SmolLM3-3B is published with 2, and no setting let it through."""
    assert read(tmp_path, pretraining_tp=2, hidden_dropout_prob=0.1) == read(tmp_path)


def test_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json: is missing.*model\.hf"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ArtifactError, match="not a JSON object"):
        read_architecture(tmp_path)


def test_neox_files_of_late_transformers_4_hold_the_rotation_twice(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 96,
        "rotary_emb_base": 20000,
        "rotary_pct": 0.5,
    }

    def written(**more: Any) -> Architecture:
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        return read_architecture(tmp_path)

    twice = written(rope_theta=20000, partial_rotary_factor=0.5)
    assert twice == written() and twice.ropes == (Rope(20000.0, None, 0.5),)
    for key, value in (("rope_theta", 10000), ("partial_rotary_factor", 0.25)):
        with pytest.raises(ConfigError, match=rf"{key} = {value}: disagrees with the "):
            written(**{key: value})


def test_a_cap_that_transformers_does_not_apply_is_refused(tmp_path: Path) -> None:
    """Of the logits, in the class with images: the class of the text part alone applies it."""
    from transformers import Gemma3Config, Gemma3TextConfig

    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    Gemma3TextConfig(**text, final_logit_softcapping=5.0).save_pretrained(tmp_path / "text")
    assert read_architecture(tmp_path / "text").logit_cap == 5.0
    Gemma3Config(text_config=text).save_pretrained(tmp_path / "images")
    assert read_architecture(tmp_path / "images").logit_cap is None
    capped = Gemma3Config(text_config={**text, "final_logit_softcapping": 5.0})
    capped.save_pretrained(tmp_path / "capped")
    with pytest.raises(ConfigError, match=r"final_logit_softcapping = 5.0: null for a model with"):
        read_architecture(tmp_path / "capped")
