"""Llama 1 to 3.3, and models of its class such as SmolLM2."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Biases on every linear or on none of an attention or feed-forward part."""
    bias = keys.flag("attention_bias")
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps")),
        ropes=(keys.rope(),),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=keys.flag("mlp_bias"),
    )


LLAMA = Family(
    read,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    neutral={
        "hidden_act": ("silu", "swish"),
        "sliding_window": (),
        "use_sliding_window": (False,),
    },
)
