"""GPT-2: a learned table of positions, and linears that the file holds transposed."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import GELUS, ConfigKeys
from megamask.weights.family import Architecture, Family, Names, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Biases everywhere, and a feed-forward part of four times the hidden width by default."""
    keys.refuse_groups(plain)
    return replace(
        plain,
        norm=Norm("layer", keys.real("layer_norm_epsilon"), bias=True),
        ropes=(),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        activation=keys.choice("activation_function", GELUS),
        gated=False,
    )


GPT2 = Family(
    read,
    Names(
        embedding="transformer.wte",
        positions="transformer.wpe",
        layer="transformer.h.{}.",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        mlp_norm="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        final_norm="transformer.ln_f",
        prefix="transformer.",
        transposed=True,
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    defaults={
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    neutral={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
    },
    harmless=frozenset({"n_ctx"}),
    ffn_factor=4,
    aliases={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
)
