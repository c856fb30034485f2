"""Nemotron-4 and Minitron: LayerNorm with 1 + weight, squared ReLU without a gate."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Names, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Half of each head is rotated where the file does not say otherwise."""
    bias, width = keys.flag("attention_bias"), keys.value("kv_channels", plain.head_dim)
    if width != plain.head_dim:
        raise keys.error("kv_channels", width, f"head_dim is {plain.head_dim}")
    return replace(
        plain,
        norm=Norm("layer", keys.real("norm_eps"), plus_one=True, bias=True),
        ropes=(keys.rope(share_key="partial_rotary_factor"),),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
        activation="relu2",
        gated=False,
    )


NEMOTRON = Family(
    read,
    Names(up=("mlp.up_proj",)),
    defaults={
        "norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.5,
    },
    neutral={"hidden_act": ("relu2",)},
)
