"""Gemma 2 and Gemma 3: norms with 1 + weight before and after each part, and windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.families.composites import with_images
from megamask.weights.family import Architecture, Family, Layer, Names, Norm

NAMES = Names(
    mlp_norm="pre_feedforward_layernorm",  # post_attention_layernorm is a post-norm here
)
DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}
# The class reads hidden_activation; old files also carry the key of other families.
HARMLESS = frozenset({"hidden_act"})


def read_common(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """The scores are divided by the root of ``query_pre_attn_scalar``, not of the head's width."""
    bias = keys.flag("attention_bias")
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps"), plus_one=True),
        attention_bias=bias,
        attention_out_bias=bias,
        activation="gelu_tanh",
        post_norms=True,
        attention_scale=keys.real("query_pre_attn_scalar") ** -0.5,
        attention_cap=keys.cap("attn_logit_softcapping"),
        logit_cap=keys.cap("final_logit_softcapping"),
        embedding_scale=plain.hidden**0.5,
        rounds_embedding_scale=True,
    )


def read_gemma2(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Every other layer has a window, from the first on."""
    alternate = [index % 2 == 0 for index in range(plain.num_layers)]
    return replace(
        read_common(keys, plain),
        ropes=(keys.rope(),),
        layers=keys.layer_windows(keys.window(), alternate),
    )


def read_gemma3(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Layers with a window have a rotary base of their own, which is never scaled."""
    if (cap := keys.cap("attn_logit_softcapping")) is not None:
        problem = "null for Gemma 3: transformers does not apply it"
        raise keys.error("attn_logit_softcapping", cap, problem)
    pattern = keys.whole("sliding_window_pattern", keys.whole("_sliding_window_pattern", 6))
    usual = [(index + 1) % pattern != 0 for index in range(plain.num_layers)]
    layers = keys.layer_windows(keys.window() or plain.max_positions, usual)
    return replace(
        read_common(keys, plain),
        ropes=(
            keys.rope(inside="full_attention"),
            keys.rope("rope_local_base_freq", inside="sliding_attention", scaled=False),
        ),
        layers=tuple(Layer(0 if one.window is None else 1, one.window) for one in layers),
        qk_norm="head",
    )


GEMMA2 = Family(
    read_gemma2,
    NAMES,
    defaults={
        **DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    neutral=NEUTRAL,
    harmless=HARMLESS | {"sliding_window_size"},
)
GEMMA3 = Family(
    read_gemma3,
    NAMES,
    defaults={
        **DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    neutral=NEUTRAL,
    harmless=HARMLESS,
)
GEMMA3_WITH_IMAGES = with_images(
    GEMMA3,
    "gemma3_text",
    frozenset({
        "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
        "image_token_index",
    }),
)  # fmt: skip
