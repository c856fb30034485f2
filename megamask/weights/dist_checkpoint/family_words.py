"""An architecture in the words of config.json, a function for each family.

A function writes what the words of its family can say; whether that is the whole architecture shows
when the words are read back. The width of a head is left out where the class of transformers
derives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megamask.weights.family import Architecture

GELU = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def _common(arch: Architecture, model_type: str, name: str, **words: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": arch.hidden,
        "intermediate_size": arch.ffn,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "vocab_size": arch.vocab,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tied,
        "torch_dtype": str(arch.dtype).removeprefix("torch."),
        **words,
    }


def _rope(
    arch: Architecture, theta: str = "rope_theta", share: str | None = None
) -> dict[str, Any]:
    if not arch.ropes:
        return {}
    rope = arch.ropes[0]
    words: dict[str, Any] = {theta: rope.theta}
    if share is not None:
        words[share] = rope.share
    if rope.scaling is not None:
        scaling = dict(rope.scaling)
        words["rope_scaling"] = {"rope_type": scaling.pop("type"), **scaling}
    return words


def _gated(arch: Architecture, model_type: str, name: str, **words: Any) -> dict[str, Any]:
    words |= {"rms_norm_eps": arch.norm.eps, "hidden_act": "silu", "head_dim": arch.head_dim}
    return _common(arch, model_type, name, **words, **_rope(arch))


def _llama(arch: Architecture) -> dict[str, Any]:
    biases = {"attention_bias": arch.attention_out_bias, "mlp_bias": arch.mlp_bias}
    return _gated(arch, "llama", "Llama", **biases)


def _qwen2(arch: Architecture) -> dict[str, Any]:
    return _gated(arch, "qwen2", "Qwen2", use_sliding_window=False)


def _qwen3(arch: Architecture) -> dict[str, Any]:
    bias = arch.attention_out_bias
    return _gated(arch, "qwen3", "Qwen3", use_sliding_window=False, attention_bias=bias)


def _nemotron(arch: Architecture) -> dict[str, Any]:
    words = {"norm_eps": arch.norm.eps, "hidden_act": "relu2", "head_dim": arch.head_dim}
    biases = {"attention_bias": arch.attention_bias, "mlp_bias": arch.mlp_bias}
    rope = _rope(arch, share="partial_rotary_factor")
    return _common(arch, "nemotron", "Nemotron", **words, **biases, **rope)


def _stablelm(arch: Architecture) -> dict[str, Any]:
    words = {"layer_norm_eps": arch.norm.eps, "hidden_act": "silu"}
    switches = {"use_qkv_bias": arch.attention_bias, "use_parallel_residual": False}
    rope = _rope(arch, share="partial_rotary_factor")
    return _common(arch, "stablelm", "StableLm", **words, **switches, **rope)


def _starcoder2(arch: Architecture) -> dict[str, Any]:
    words = {"norm_epsilon": arch.norm.eps, "hidden_act": GELU.get(arch.activation)}
    switches = {"use_bias": arch.mlp_bias, "sliding_window": None}
    return _common(arch, "starcoder2", "Starcoder2", **words, **switches, **_rope(arch))


def _gpt_neox(arch: Architecture) -> dict[str, Any]:
    words = {"layer_norm_eps": arch.norm.eps, "hidden_act": GELU.get(arch.activation)}
    switches = {"attention_bias": arch.attention_bias, "use_parallel_residual": False}
    rope = _rope(arch, "rotary_emb_base", "rotary_pct")
    return _common(arch, "gpt_neox", "GPTNeoX", **words, **switches, **rope)


def _gpt2(arch: Architecture) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": arch.hidden,
        "n_inner": arch.ffn,
        "n_layer": arch.num_layers,
        "n_head": arch.heads,
        "n_positions": arch.max_positions,
        "vocab_size": arch.vocab,
        "tie_word_embeddings": arch.tied,
        "layer_norm_epsilon": arch.norm.eps,
        "activation_function": GELU.get(arch.activation),
        "torch_dtype": str(arch.dtype).removeprefix("torch."),
    }


# Families with the fewest freedoms come first.
WRITERS: tuple[Callable[[Architecture], dict[str, Any]], ...] = (
    _llama,
    _qwen2,
    _qwen3,
    _nemotron,
    _stablelm,
    _starcoder2,
    _gpt_neox,
    _gpt2,
)
