"""OLMo-2: norms after attention and feed-forward part alone, and over all queries and keys."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """The linears read the residual stream itself."""
    bias = keys.flag("attention_bias")
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps")),
        ropes=(keys.rope(),),
        attention_bias=bias,
        attention_out_bias=bias,
        pre_norms=False,
        post_norms=True,
        qk_norm="all heads",
    )


OLMO2 = Family(
    read,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    neutral={"hidden_act": ("silu",), "clip_qkv": ()},
)
