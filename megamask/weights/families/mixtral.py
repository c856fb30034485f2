"""Mixtral: a Mistral whose feed-forward parts are experts."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Layer, Names, Norm

# Keys of training alone: noise on the router's inputs, and a loss that balances the experts.
TRAINING = frozenset({"router_aux_loss_coef", "output_router_logits", "router_jitter_noise"})


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """Every layer has experts, and the factors of the chosen experts sum to 1."""
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps")),
        ropes=(keys.rope(),),
        layers=(Layer(window=keys.window(), experts=True),) * plain.num_layers,
        experts=keys.experts(plain.ffn, renormalise=True),
    )


MIXTRAL = Family(
    read,
    names=Names(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_up=("w1", "w3"),
        expert_down="w2",
    ),
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    neutral={"hidden_act": ("silu",), "attention_bias": (False,)},
    harmless=TRAINING,
)
