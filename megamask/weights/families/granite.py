"""Granite 3: a Llama with factors on embedding, attention, residual sums and logits."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.families import llama
from megamask.weights.family import Architecture, Family


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """The attention's factor is a factor of the scores, in the place of 1 / sqrt(head_dim)."""
    return replace(
        llama.read(keys, plain),
        attention_scale=keys.real("attention_multiplier"),
        embedding_scale=keys.real("embedding_multiplier"),
        residual_scale=keys.real("residual_multiplier"),
        logit_scale=1 / keys.real("logits_scaling"),
    )


GRANITE = Family(
    read,
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    neutral={"hidden_act": ("silu",)},
)
