"""Qwen2, Qwen2.5 and Qwen3: biases of queries, keys and values, or norms of queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Layer, Norm

DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# Qwen2.5's files name switches of the image models of the same code.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_mrope": (False,),
}


def read_common(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Every file names a window, but it counts only with ``use_sliding_window``, and then in the
    layers from ``max_window_layers`` on.
    """
    limited = keys.flag("use_sliding_window")
    window, first = keys.window(), keys.value("max_window_layers")
    if type(first) is not int or first < 0:
        raise keys.error("max_window_layers", first, "a whole number is needed")
    upper = [index >= first for index in range(plain.num_layers)]
    layers = keys.layer_windows(window if limited else None, upper)
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps")),
        ropes=(keys.rope(),),
        layers=() if set(layers) == {Layer()} else layers,
    )


def read_qwen2(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Queries, keys and values have a bias; the output projection has none."""
    return replace(read_common(keys, plain), attention_bias=True)


def read_qwen3(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Every head of queries and keys has a norm."""
    bias = keys.flag("attention_bias")
    return replace(
        read_common(keys, plain), attention_bias=bias, attention_out_bias=bias, qk_norm="head"
    )


QWEN2 = Family(
    read_qwen2,
    defaults=DEFAULTS | {"num_key_value_heads": 32},
    neutral=NEUTRAL | {"attention_bias": (False,)},
)
QWEN3 = Family(
    read_qwen3,
    defaults=DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
    neutral=NEUTRAL,
)
