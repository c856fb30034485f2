"""Qwen1.5-MoE and Qwen2-MoE, whose layers also have an expert of every token, and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.families.mixtral import TRAINING
from megamask.weights.family import Architecture, Family, Layer, Norm

DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}


def read_common(
    keys: ConfigKeys, plain: Architecture, windows: Sequence[Layer], shared_ffn: int | None
) -> Architecture:
    """``decoder_sparse_step`` counts layers from 1; ``mlp_only_layers`` counts them from 0."""
    step, dense = keys.whole("decoder_sparse_step"), keys.value("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(one) is not int or one < 0 for one in dense):
        raise keys.error("mlp_only_layers", dense, "a list of numbers of layers is needed")
    layers = tuple(
        replace(layer, experts=index not in dense and (index + 1) % step == 0)
        for index, layer in enumerate(windows)
    )
    ffn, renormalise = keys.whole("moe_intermediate_size"), keys.flag("norm_topk_prob")
    experts = keys.experts(ffn, renormalise, shared_ffn)
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps")),
        ropes=(keys.rope(),),
        layers=layers,
        experts=experts if any(layer.experts for layer in layers) else None,
    )


def read_qwen2(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """A window counts only with ``use_sliding_window``, and then in every second of the layers
    below ``max_window_layers``, unless ``layer_types`` says otherwise.
    """
    limited, end = keys.flag("use_sliding_window"), keys.value("max_window_layers")
    window = keys.window() if limited else None
    if type(end) is not int or end < 0:
        raise keys.error("max_window_layers", end, "a whole number is needed")
    otherwise = [limited and index % 2 == 0 and index < end for index in range(plain.num_layers)]
    layers = keys.layer_windows(window, otherwise)
    arch = read_common(keys, plain, layers, keys.whole("shared_expert_intermediate_size"))
    return replace(arch, attention_bias=keys.flag("qkv_bias"))


def read_qwen3(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Every head of queries and keys has a norm. A window counts only with
    ``use_sliding_window``.
    """
    window = keys.window() if keys.flag("use_sliding_window") else None
    layers = (Layer(window=window),) * plain.num_layers
    bias = keys.flag("attention_bias")
    return replace(
        read_common(keys, plain, layers, None),
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
    )


QWEN2_MOE = Family(
    read_qwen2,
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    neutral={"hidden_act": ("silu",), "use_mrope": (False,)},
    harmless=TRAINING | {"sliding_window"},
)
QWEN3_MOE = Family(
    read_qwen3,
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    neutral={"hidden_act": ("silu",)},
    harmless=TRAINING | {"sliding_window", "max_window_layers"},
)
