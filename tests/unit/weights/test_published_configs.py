"""What is read from the config.json files of ``published``, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.errors import ConfigError
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.families.registry import FAMILIES
from megamask.weights.family import Experts, Layer, Norm, Rope
from megamask.weights.mapping import check_tp
from tests.fork_server import ROOT
from tests.unit.weights.published import (
    COMMON,
    GEMMA2,
    GEMMA3,
    GEMMA3_4B,
    GPT2,
    MINITRON,
    MISTRAL,
    MIXTRAL,
    NEOX_20B,
    PHI3,
    PHI4,
    PUBLISHED,
    PYTHIA,
    QWEN3,
    QWEN3_MOE,
    QWEN15_MOE,
    QWEN25,
    SMOLLM3,
    STARCODER2,
)


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


def test_every_family_has_a_published_file() -> None:
    assert {config["model_type"] for config in PUBLISHED.values()} == set(FAMILIES)


def test_the_text_part_of_a_model_with_images_is_read_as_a_model_of_its_own(
    tmp_path: Path,
) -> None:
    arch, text = read(tmp_path, GEMMA3_4B), GEMMA3_4B["text_config"]
    plain = {**text, "tie_word_embeddings": True}
    assert arch == replace(read(tmp_path, plain), family="gemma3")
    assert (arch.vocab, arch.heads, arch.head_dim, arch.dtype) == (262208, 8, 256, torch.bfloat16)
    assert arch.ropes[0] == Rope(1e6, {"type": "linear", "factor": 8.0})
    assert sum(layer.window is None for layer in arch.layers) == 5
    # a dtype of the text part gives way to that of the file, which transformers loads in
    assert read(tmp_path, GEMMA3_4B, text_config={**text, "torch_dtype": "float32"}) == arch
    untied = {**text, "tie_word_embeddings": False}
    assert not read(tmp_path, GEMMA3_4B, text_config=untied, tie_word_embeddings=False).tied


@pytest.mark.parametrize(
    ("outside", "inside", "words"),
    [
        ({}, {"shortcut_gain": 0.5}, r"text_config\.shortcut_gain.*\[text_config\.shortcut_gain\]"),
        ({}, {"hidden_size": None}, r"text_config\.hidden_size"),
        ({}, {"use_bidirectional_attention": True}, r"text_config\.use_bidirectional_attention"),
        ({}, {"model_type": "llama"}, r"text_config\.model_type.*only gemma3_text"),
        ({}, {"tie_word_embeddings": False}, r"text_config\.tie_word_embeddings.*disagrees"),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, "disagrees"),
        ({"text_config": None}, {}, "text_config.*an object is needed"),
        ({"text_config": [1]}, {}, "text_config.*an object is needed"),
        ({"use_bfloat16": True}, {}, "use_bfloat16"),
    ],
)
def test_what_the_text_part_of_a_model_with_images_must_not_say(
    tmp_path: Path, outside: dict[str, Any], inside: dict[str, Any], words: str
) -> None:
    text = {**GEMMA3_4B["text_config"], **inside}
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, GEMMA3_4B, **{"text_config": text, **outside})


def test_an_unknown_key_of_a_text_part_is_let_through_by_its_whole_name(tmp_path: Path) -> None:
    text = {**GEMMA3_4B["text_config"], "shortcut_gain": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({**GEMMA3_4B, "text_config": text}))
    assert read_architecture(tmp_path, ["text_config.shortcut_gain"]).num_layers == 34
    with pytest.raises(ConfigError, match="shortcut_gain"):
        read_architecture(tmp_path, ["shortcut_gain"])


def test_the_documents_list_every_family() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    first_column = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    listed = {name for cell in first_column for name in re.findall(r"`(\w+)`", cell)}
    assert listed - {"model_type"} == set(FAMILIES)


def test_what_the_published_files_say(tmp_path: Path) -> None:
    smollm3 = read(tmp_path, SMOLLM3)
    assert [layer.rope for layer in smollm3.layers[:5]] == [0, 0, 0, None, 0] and smollm3.tied
    assert read(tmp_path, PHI4).layer(0) == Layer(0, None) and read(tmp_path, PHI4).kv_heads == 10
    assert read(tmp_path, NEOX_20B).activation == "gelu_tanh"
    assert (read(tmp_path, GPT2).ffn, read(tmp_path, GPT2).ropes) == (3072, ())


def test_queries_of_a_family_without_groups_are_not_grouped(tmp_path: Path) -> None:
    """The classes of transformers read no number of KV heads, so another number would be wrong."""
    for config, heads in ((GPT2, 12), (NEOX_20B, 64)):
        with pytest.raises(ConfigError, match=rf"num_key_value_heads = 4: .* its {heads} heads"):
            read(tmp_path, config, num_key_value_heads=4)
        assert read(tmp_path, config, num_key_value_heads=heads) == read(tmp_path, config)


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


def two_ropes(**more: Any) -> dict[str, Any]:
    """Gemma 3's rotary embeddings in the spelling of transformers 5, and more."""
    ropes = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    old = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling"), "absent")
    return {**old, "rope_parameters": {**ropes, **more}}


def test_what_a_family_does_not_build_is_refused_by_name(tmp_path: Path) -> None:
    longrope = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (PHI3, {"rope_scaling": longrope}, "rope_scaling.rope_type"),
        (PHI3, {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map"),
        (PHI4, {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map"),
        (MINITRON, {"hidden_act": "silu"}, "hidden_act"),
        (MINITRON, {"kv_channels": 64}, "kv_channels"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (GEMMA3, two_ropes(chunked_attention={"rope_theta": 1e4}), "rope_parameters.chunked"),
        (GEMMA3, two_ropes(rope_type="linear", factor=8.0), "rope_parameters.rope_type"),
        (PYTHIA, {"hidden_act": "relu"}, "hidden_act"),
        (PYTHIA, {"rotary_pct": 1.5}, "rotary_pct"),
        (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        (MISTRAL, {"sliding_window": -1}, "sliding_window"),
    ]
    for config, changes, key in wrong:
        with pytest.raises(ConfigError, match=rf"config\.json: {key}"):
            read(tmp_path, config, **changes)


def test_what_the_files_of_experts_say(tmp_path: Path) -> None:
    """Both spellings of the number of experts, dense layers in between, and refusals by name."""
    mixtral = read(tmp_path, MIXTRAL)
    assert mixtral.experts == Experts(8, 2, 14336, renormalise=True) and mixtral.layer(5).experts
    assert read(tmp_path, MIXTRAL, num_local_experts="absent", num_experts=8) == mixtral
    shared = read(tmp_path, QWEN15_MOE)
    assert shared.experts == Experts(60, 4, 1408, renormalise=False, shared_ffn=5632)
    assert shared.attention_bias and not read(tmp_path, QWEN15_MOE, qkv_bias=False).attention_bias
    qwen3 = read(tmp_path, QWEN3_MOE)
    assert qwen3.experts == Experts(128, 8, 768, renormalise=True) and qwen3.qk_norm == "head"
    for change in (
        {"num_experts": "absent", "num_local_experts": 128},
        {"router_aux_loss_coef": 9},
    ):
        assert read(tmp_path, QWEN3_MOE, **change) == qwen3
    sparse = read(tmp_path, QWEN3_MOE, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.experts for layer in sparse.layers[:6]] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert read(tmp_path, QWEN3_MOE, mlp_only_layers=list(range(48))).experts is None
    for key, value in {
        "num_experts_per_tok": 129,
        "num_local_experts": 64,
        "mlp_only_layers": [-1],
        "decoder_sparse_step": 0,
        "moe_intermediate_size": 0,
        "norm_topk_prob": 1,
    }.items():
        with pytest.raises(ConfigError, match=rf"config\.json: (num_experts = 128.*)?{key}"):
            read(tmp_path, QWEN3_MOE, **{key: value})


def test_every_width_of_a_feed_forward_part_splits_over_the_ranks(tmp_path: Path) -> None:
    check_tp(read(tmp_path, QWEN3_MOE), 8)
    check_tp(read(tmp_path, QWEN3_MOE, intermediate_size=6145), 8)  # no layer is dense
    for change in (
        {"moe_intermediate_size": 764},
        {"intermediate_size": 6145, "mlp_only_layers": [0]},
    ):
        with pytest.raises(ConfigError, match=r"parallel\.tp = 8.*(764|6145)"):
            check_tp(read(tmp_path, QWEN3_MOE, **change), 8)
    with pytest.raises(ConfigError, match="shared_expert_intermediate_size = 5630"):
        check_tp(read(tmp_path, QWEN15_MOE, shared_expert_intermediate_size=5630), 8)
