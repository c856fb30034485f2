"""StarCoder2: LayerNorm, biases everywhere, a window, and no gate."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import GELUS, ConfigKeys
from megamask.weights.family import Architecture, Family, Names, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """``use_bias`` speaks of all linears."""
    bias = keys.flag("use_bias")
    return replace(
        plain,
        norm=Norm("layer", keys.real("norm_epsilon"), bias=True),
        ropes=(keys.rope(),),
        layers=keys.one_window(plain),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        activation=keys.choice("hidden_act", GELUS),
        gated=False,
    )


STARCODER2 = Family(
    read,
    Names(up=("mlp.c_fc",), down="mlp.c_proj"),
    defaults={
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    neutral={
        "norm_type": ("layer_norm",),
        "mlp_type": ("default",),
        "scale_attn_weights": (True,),
    },
    harmless=frozenset(
        {
            "attention_bias",  # the published files carry it, and the class reads use_bias alone
            "layer_norm_epsilon",  # the class reads norm_epsilon
            "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32",
        }
    ),
)
