"""The Llama family: its config keys and its mapping table.

The names are those of megatron-core's GPTModel with the layer spec of ``megamask.model.spec``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megamask.errors import ConfigError
from megamask.weights.family import Architecture, Family
from megamask.weights.rule import Kind, Rule

# Keys that are read below.
READ = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "torch_dtype",
    "dtype",
}
# Keys that cannot change the arithmetic of a forward pass in evaluation mode.
HARMLESS = {
    "architectures",
    "model_type",
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation_autoset",
    "attn_implementation",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "torchscript",
    "is_llama_config",
    "is_decoder",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "tokenizer_class",
    "prefix",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_dict_in_generate",
    "output_scores",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "finetuning_task",
    "max_sequence_length",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "num_beams",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "license",
}
# Keys that can change the arithmetic, with the values that leave it unchanged.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "auto_map": ({},),
}
# The sizes that every config.json must hold.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
MAX_LAYERS = 10_000
ROPE_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read(config: dict[str, Any], path: Path) -> Architecture:
    """Read a parsed config.json. Absent keys have the defaults of transformers' LlamaConfig.

    Raises:
        ConfigError: a key is missing or unknown, or changes the arithmetic in a way that is not
            built.
    """
    _refuse_unknown(config, path)
    given = {key: value for key, value in config.items() if value is not None}
    numbers = {key: _whole(given, key, path) for key in SIZES}
    heads, bias = numbers["num_attention_heads"], _flag(given, "attention_bias", path)
    kv_heads = _whole(given, "num_key_value_heads", path, heads)
    if heads % kv_heads:
        problem = f"must divide num_attention_heads ({heads})"
        raise _error("num_key_value_heads", kv_heads, problem, path)
    theta, scaling = _read_rope(given, path)
    return Architecture(
        family="llama",
        num_layers=numbers["num_hidden_layers"],
        hidden=numbers["hidden_size"],
        ffn=numbers["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_whole(given, "head_dim", path, max(numbers["hidden_size"] // heads, 1)),
        vocab=numbers["vocab_size"],
        max_positions=_whole(given, "max_position_embeddings", path, 2048),
        tied=_flag(given, "tie_word_embeddings", path),
        norm_eps=_real(given, "rms_norm_eps", path, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=_flag(given, "mlp_bias", path),
        dtype=_read_dtype(given, path),
    )


def rules(arch: Architecture, padded_vocab: int) -> list[Rule]:
    """The mapping table in the order of the model: embedding, layers, final norm, head."""
    vocabulary = ((arch.vocab, arch.hidden),)

    def vocabulary_rule(megatron: str, hf: str) -> Rule:
        return Rule(megatron, (hf,), "vocab", vocabulary, padded_rows=padded_vocab)

    table = [vocabulary_rule("embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for layer in range(arch.num_layers):
        table += _layer_rules(arch, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    table.append(_norm_rule("decoder.final_layernorm", "model.norm", arch))
    if not arch.tied:
        table.append(vocabulary_rule("output_layer.weight", "lm_head.weight"))
    return table


def _norm_rule(megatron: str, hf: str, arch: Architecture) -> Rule:
    return Rule(f"{megatron}.weight", (f"{hf}.weight",), "replicate", ((arch.hidden,),))


def _layer_rules(arch: Architecture, megatron: str, hf: str) -> list[Rule]:
    h, q, kv = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    attention, mlp = f"{hf}self_attn.", f"{hf}mlp."
    qkv = {
        f"{attention}q_proj": (q, h),
        f"{attention}k_proj": (kv, h),
        f"{attention}v_proj": (kv, h),
    }
    gated = {f"{mlp}gate_proj": (arch.ffn, h), f"{mlp}up_proj": (arch.ffn, h)}
    return [
        _norm_rule(f"{megatron}input_layernorm", f"{hf}input_layernorm", arch),
        *_linear(
            f"{megatron}self_attention.linear_qkv", qkv, "qkv", arch.attention_bias, arch.kv_heads
        ),
        *_linear(
            f"{megatron}self_attention.linear_proj",
            {f"{attention}o_proj": (h, q)},
            "row",
            arch.attention_out_bias,
        ),
        _norm_rule(f"{megatron}pre_mlp_layernorm", f"{hf}post_attention_layernorm", arch),
        *_linear(f"{megatron}mlp.linear_fc1", gated, "gated", arch.mlp_bias),
        *_linear(
            f"{megatron}mlp.linear_fc2", {f"{mlp}down_proj": (h, arch.ffn)}, "row", arch.mlp_bias
        ),
    ]


def _linear(
    megatron: str, hf: dict[str, tuple[int, int]], kind: Kind, bias: bool, kv_groups: int = 1
) -> list[Rule]:
    """The rules of a linear: its weight and, with ``bias``, its bias; ``hf`` is name -> (O, I)."""
    shapes = tuple(hf.values())
    table = [
        Rule(
            f"{megatron}.weight",
            tuple(f"{name}.weight" for name in hf),
            kind,
            shapes,
            True,
            kv_groups,
        )
    ]
    # A row-parallel linear adds its bias after the sum over ranks, so every rank holds all of it.
    if bias:
        kind = "replicate" if kind == "row" else kind
        table.append(
            Rule(
                f"{megatron}.bias",
                tuple(f"{name}.bias" for name in hf),
                kind,
                tuple(s[:1] for s in shapes),
                False,
                kv_groups,
            )
        )
    return table


def _refuse_unknown(config: dict[str, Any], path: Path) -> None:
    for key, value in config.items():
        if value is None or key in READ or key in HARMLESS:
            continue
        neutral = NEUTRAL.get(key)
        if neutral is None:
            raise _error(
                key,
                value,
                "megamask does not know this key, so it cannot tell what it changes",
                path,
            )
        if value not in neutral:
            allowed = " or ".join(map(repr, neutral)) or "null"
            raise _error(key, value, f"only {allowed} is built for the Llama family", path)


def _read_rope(config: dict[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding.

    transformers 4 writes them as rope_theta and rope_scaling, transformers 5 as rope_parameters.
    """
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    if not isinstance(config.get(key, {}), dict):
        raise _error(key, config[key], "an object is needed", path)
    rope = dict(config.get(key, {}))
    inner, outer = rope.pop("rope_theta", None), config.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise _error("rope_theta", outer, f"disagrees with {key}.rope_theta = {inner}", path)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise _error(
            f"{key}.partial_rotary_factor",
            config[key]["partial_rotary_factor"],
            "only 1.0 is built",
            path,
        )
    old_type = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_type)
    factors = ROPE_FACTORS.get(kind) if isinstance(kind, str) else None
    if factors is None:
        raise _error(f"{key}.rope_type", kind, f"only {', '.join(ROPE_FACTORS)} are built", path)
    rope = {name: value for name, value in rope.items() if value is not None}
    for name in sorted(rope.keys() ^ set(factors)):
        problem = (
            "megamask does not know this key" if name in rope else f"rope type {kind} needs it"
        )
        raise _error(f"{key}.{name}", rope.get(name), problem, path)
    for name in rope:
        _real(rope, name, path, shown=f"{key}.{name}")
    theta = {"rope_theta": inner if inner is not None else outer}
    return _real(theta, "rope_theta", path, 10000.0), {"type": kind, **rope} if factors else None


def _whole(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    """A positive whole number below 2^31.

    Raises:
        ConfigError: the key is missing without a default, or holds something else.
    """
    value = config.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise _error(key, value, "a positive whole number is needed", path)
    if key == "num_hidden_layers" and value > MAX_LAYERS:
        raise _error(key, value, f"at most {MAX_LAYERS:,} layers are read", path)
    return value


def _real(
    config: dict[str, Any],
    key: str,
    path: Path,
    default: float | None = None,
    shown: str | None = None,
) -> float:
    """A positive finite number. Raises as ``_whole``, naming ``shown``."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise _error(shown or key, value, "a positive number is needed", path)
    return float(value)


def _flag(config: dict[str, Any], key: str, path: Path) -> bool:
    """true or false; an absent key is false. Raises as ``_whole``."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _error(key, value, "true or false is needed", path)
    return value


def _read_dtype(config: dict[str, Any], path: Path) -> torch.dtype:
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = str(config.get(key, "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise _error(key, name, f"one of {', '.join(DTYPES)}", path)
    return DTYPES[name]


def _error(key: str, value: Any, problem: str, path: Path) -> ConfigError:
    fix = (
        "Point model.hf at a plain Llama checkpoint, "
        f"or correct {path} if the key has no effect there."
    )
    return ConfigError(f"config.json: {key}", value, problem, fix)


LLAMA = Family(read, rules)
