"""Mistral 7B, Nemo and later dense models of the class: a Llama with a window."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """``sliding_window: null`` means no window; an absent key means 4096."""
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps")),
        ropes=(keys.rope(),),
        layers=keys.one_window(plain),
    )


MISTRAL = Family(
    read,
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    neutral={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
)
