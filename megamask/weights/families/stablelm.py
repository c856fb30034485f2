"""StableLM: LayerNorm, SwiGLU and a partial rotation, as the GPT-3 shapes of MaskLLM's paper."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Queries, keys and values may have a bias; no other linear has one."""
    return replace(
        plain,
        norm=Norm("layer", keys.real("layer_norm_eps"), bias=True),
        ropes=(keys.rope(share_key="partial_rotary_factor"),),
        attention_bias=keys.flag("use_qkv_bias"),
    )


STABLELM = Family(
    read,
    defaults={
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
    },
    neutral={
        "hidden_act": ("silu",),
        "qk_layernorm": (False,),
        "use_parallel_residual": (False,),
    },
)
