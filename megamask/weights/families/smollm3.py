"""SmolLM3: a Llama in which every fourth layer has no rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.families import llama
from megamask.weights.family import Architecture, Family, Layer


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """In ``no_rope_layers`` 1 means a layer with a rotary embedding, and 0 a layer without."""
    count = plain.num_layers
    interval = keys.whole("no_rope_layer_interval")
    rotated = keys.list_of("no_rope_layers", {1: True, 0: False}, count)
    if rotated is None:
        rotated = [(index + 1) % interval != 0 for index in range(count)]
    keys.layer_windows(None, [False] * count)
    return replace(
        llama.read(keys, plain),
        layers=tuple(Layer(rope=0 if one else None) for one in rotated),
    )


SMOLLM3 = Family(
    read,
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    neutral={"hidden_act": ("silu",), "use_sliding_window": (False,), "sliding_window": ()},
    harmless=frozenset({"max_window_layers"}),
)
