"""A tiny random model of every family, made and saved by transformers, and wrong readings of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megamask.weights.architecture import Architecture
from megamask.weights.family import Experts, Layer, Rope

VOCAB, LENGTH = 131, 64  # an odd vocabulary is padded at TP 2
WINDOW = 24
Wrong = Callable[[Architecture], Architecture]


@dataclass(frozen=True)
class Variant:
    """A model.

    Attributes:
        model_type: of transformers.
        keys: of its config, on top of tiny sizes.
        wrong: name -> a wrong reading of the architecture, which must show in the logits.
    """

    model_type: str
    keys: dict[str, Any]
    wrong: dict[str, Wrong]


def set_(**changes: Any) -> Wrong:
    """The architecture with other facts."""
    return lambda arch: replace(arch, **changes)


def norm(**changes: Any) -> Wrong:
    """The architecture with another norm."""
    return lambda arch: replace(arch, norm=replace(arch.norm, **changes))


def ropes(**changes: Any) -> Wrong:
    """The architecture with other rotary embeddings."""
    return lambda arch: replace(arch, ropes=tuple(replace(one, **changes) for one in arch.ropes))


def windows(change: Callable[[int | None], int | None]) -> Wrong:
    """The architecture with other windows."""
    return lambda arch: replace(
        arch, layers=tuple(replace(one, window=change(one.window)) for one in arch.layers)
    )


def layers(change: Callable[[tuple[Layer, ...]], tuple[Layer, ...]]) -> Wrong:
    """The architecture with other facts of its layers."""
    return lambda arch: replace(arch, layers=change(arch.layers))


def experts(**changes: Any) -> Wrong:
    """The architecture with other facts of its experts."""

    def change(arch: Architecture) -> Architecture:
        assert isinstance(arch.experts, Experts)
        return replace(arch, experts=replace(arch.experts, **changes))

    return change


NO_WINDOW = windows(lambda window: None)
WIDER = windows(lambda window: None if window is None else window + 1)
FULL_ROTARY = ropes(share=1.0)
GQA = {"num_key_value_heads": 2}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WITH_IMAGES = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
    },
    "mm_tokens_per_image": 4,
}
VARIANTS: dict[str, Variant] = {
    "mistral": Variant(
        "mistral",
        {**GQA, "sliding_window": WINDOW, "head_dim": 24},
        {"no window": NO_WINDOW, "window + 1": WIDER},
    ),
    "qwen2 tied": Variant(
        "qwen2",
        {**GQA, "tie_word_embeddings": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {"theta": ropes(theta=2e4)},
    ),
    "qwen2 upper window, one kv head": Variant(
        "qwen2",
        {
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
        {"no window": NO_WINDOW, "lower window": layers(lambda all_: all_[::-1])},
    ),
    "qwen3": Variant(
        "qwen3",
        {**GQA, "head_dim": 24, "tie_word_embeddings": True},
        {"eps": norm(eps=1e-2), "theta": ropes(theta=2e4)},
    ),
    "smollm3": Variant(
        "smollm3",
        GQA,
        {
            "inverted list": layers(
                lambda all_: tuple(Layer(None if one.rope == 0 else 0) for one in all_)
            ),
            "rope everywhere": layers(lambda all_: (Layer(),) * len(all_)),
        },
    ),
    "phi3": Variant(
        "phi3",
        {
            **GQA,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
        {"no window": NO_WINDOW, "full rotary": FULL_ROTARY},
    ),
    "granite": Variant(
        "granite",
        {
            **GQA,
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 8.0,
        },
        {
            "residual": set_(residual_scale=1.0),
            "attention": set_(attention_scale=None),
            "embedding": set_(embedding_scale=1.0),
            "logits": set_(logit_scale=1.0),
        },
    ),
    "stablelm": Variant(
        "stablelm",
        {**GQA, "use_qkv_bias": True},
        {
            "full rotary": FULL_ROTARY,
            "RMSNorm": norm(kind="rms"),
            "1 + weight": norm(plus_one=True),
        },
    ),
    "nemotron": Variant(
        "nemotron",
        {**GQA, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
        {
            "no 1 +": norm(plus_one=False),
            "full rotary": FULL_ROTARY,
            "SiLU": set_(activation="silu"),
            "RMSNorm": norm(kind="rms"),
        },
    ),
    "starcoder2": Variant(
        "starcoder2",
        {**GQA, "sliding_window": WINDOW},
        {
            "exact GELU": set_(activation="gelu"),
            "no window": NO_WINDOW,
            "SiLU": set_(activation="silu"),
        },
    ),
    "gpt_neox parallel": Variant(
        "gpt_neox",
        {},
        {
            "serial": set_(parallel_residual=False),
            "full rotary": FULL_ROTARY,
            "tanh GELU": set_(activation="gelu_tanh"),
        },
    ),
    "gpt_neox serial": Variant(
        "gpt_neox", {"use_parallel_residual": False}, {"parallel": set_(parallel_residual=True)}
    ),
    "gemma2": Variant(
        "gemma2",
        {
            **GQA,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "no attention cap": set_(attention_cap=None),
            "no logit cap": set_(logit_cap=None),
            "windows swapped": layers(
                lambda all_: tuple(Layer(0, WINDOW if one.window is None else None) for one in all_)
            ),
        },
    ),
    "gemma3": Variant(
        "gemma3_text",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "query_pre_attn_scalar": 40,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "rope_parameters": GEMMA3_ROPES,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 6,
            "final_logit_softcapping": 5.0,
        },
        {
            "window + 1": WIDER,
            "no window": NO_WINDOW,
            "one rope base": lambda arch: replace(arch, ropes=(arch.ropes[0],) * 2),
            "scaled local rope": lambda arch: replace(
                arch, ropes=(arch.ropes[0], Rope(1e4, arch.ropes[0].scaling))
            ),
            "no 1 +": norm(plus_one=False),
            "no embedding scale": set_(embedding_scale=1.0),
            "1/sqrt(head_dim)": set_(attention_scale=None),
            "exact GELU": set_(activation="gelu"),
        },
    ),
    # the text part of a model with an image tower
    "gemma3 with images": Variant(
        "gemma3",
        {
            **WITH_IMAGES,
            "text_config": {
                **GQA,
                "head_dim": 16,
                "num_hidden_layers": 2,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": GEMMA3_ROPES,
            },
        },
        {"window + 1": WIDER, "no 1 +": norm(plus_one=False)},
    ),
    "olmo2": Variant(
        "olmo2",
        {},
        {"eps": norm(eps=1e-2), "theta": ropes(theta=2e4)},
    ),
    "gpt2": Variant(
        "gpt2",
        {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 128, "n_inner": 112},
        {"exact GELU": set_(activation="gelu"), "RMSNorm": norm(kind="rms")},
    ),
    "mixtral": Variant(
        "mixtral",
        {**GQA, "num_local_experts": 4, "num_hidden_layers": 2, "sliding_window": WINDOW},
        {
            "not renormalised": experts(renormalise=False),
            "one expert": experts(top_k=1),
            "no window": NO_WINDOW,
        },
    ),
    "qwen2_moe": Variant(
        "qwen2_moe",
        {
            **GQA,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
        {"renormalised": experts(renormalise=True), "two experts": experts(top_k=2)},
    ),
    "qwen3_moe": Variant(
        "qwen3_moe",
        {
            **GQA,
            "head_dim": 24,
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        {"not renormalised": experts(renormalise=False), "three experts": experts(top_k=3)},
    ),
}


def config_of(variant: Variant) -> Any:
    """The config of transformers."""
    from transformers import AutoConfig

    plain = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    if variant.model_type == "gpt2":
        plain = {"vocab_size": VOCAB}
    keys = {**plain, **variant.keys}
    if text := variant.keys.get("text_config"):
        keys = {**variant.keys, "text_config": {**plain, **text}}
    return AutoConfig.for_model(variant.model_type, **keys)


def make(folder: Path, variant: Variant, seed: int) -> Path:
    """Large random weights, norms and biases, so that everything shows in the logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(variant))
    one_plus = variant.model_type in ("gemma2", "gemma3_text", "gemma3", "nemotron")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
            mean = 1.0 if scale and not one_plus else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    model.save_pretrained(folder)
    return folder
