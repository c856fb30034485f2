"""GPT-NeoX and Pythia: attention and feed-forward part read the same residual stream."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import GELUS, ConfigKeys
from megamask.weights.family import Architecture, Family, Names, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """The fused rows in the file are already in Megatron's order."""
    keys.refuse_groups(plain)
    bias, rope = keys.flag("attention_bias"), keys.rope("rotary_emb_base", "rotary_pct")
    # Late versions of transformers 4 write both once more, under the names of other families.
    for key, read_of in (("rope_theta", rope.theta), ("partial_rotary_factor", rope.share)):
        if (given := keys.value(key, read_of)) != read_of:
            raise keys.error(key, given, f"disagrees with the {read_of:g} of rotary_*")
    return replace(
        plain,
        norm=Norm("layer", keys.real("layer_norm_eps"), bias=True),
        ropes=(rope,),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        activation=keys.choice("hidden_act", GELUS),
        gated=False,
        parallel_residual=keys.flag("use_parallel_residual"),
    )


GPT_NEOX = Family(
    read,
    Names(
        embedding="gpt_neox.embed_in",
        layer="gpt_neox.layers.{}.",
        qkv=("attention.query_key_value",),
        qkv_by_head=True,
        out="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        buffers=(".attention.bias", ".attention.masked_bias"),
    ),
    defaults={
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "attention_bias": True,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
)
