"""Phi-3 with 4k positions and Phi-4 (14B): fused projections in the file, a window."""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Family, Names, Norm


def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
    """The rotary scaling of Phi-3 with 128k positions, Phi-3.5 and Phi-4 mini (longrope) is refused
    by name.
    """
    return replace(
        plain,
        norm=Norm("rms", keys.real("rms_norm_eps")),
        ropes=(keys.rope(share_key="partial_rotary_factor"),),
        layers=keys.one_window(plain),
    )


PHI3 = Family(
    read,
    Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    neutral={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        # The published code is the code that transformers has for the class.
        "auto_map": tuple(
            {
                "AutoConfig": f"{prefix}configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": f"{prefix}modeling_phi3.Phi3ForCausalLM",
            }
            for prefix in ("", "microsoft/Phi-3-mini-4k-instruct--")
        ),
    },
    harmless=frozenset({"original_max_position_embeddings"}),
)
