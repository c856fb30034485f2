"""The settings of a model in the words of Megatron-LM and Megatron-Bridge.

Megatron-LM keeps its command line as ``args`` in ``common.pt`` of a checkpoint, takes the shape of
the model from it with ``--use-checkpoint-args`` (``load_args_from_checkpoint`` in
megatron/training/checkpointing.py), and compares the sizes with its own. Megatron-Bridge keeps the
fields of its model provider, which are those of ``TransformerConfig``, under ``model`` in
``run_config.yaml``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megamask.config.yaml_text import read_yaml
from megamask.errors import ConfigError
from megamask.safe_checkpoint import told_args
from megamask.weights.dist_checkpoint.checkpoint_folder import RUN_CONFIG
from megamask.weights.dist_checkpoint.layer_settings import layer_disagreements
from megamask.weights.families.registry import FAMILIES
from megamask.weights.family import Architecture
from megamask.weights.frequencies import LLAMA3

RUN_CONFIG_BYTES = 2**24  # a longer file is not read

# word of Megatron-LM's args -> word of TransformerConfig, where they differ
ARGS = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
# Settings that change what a GPTModel computes -> the value that no model of ours differs from.
# Tensors do not show them.
NEUTRAL: dict[str, bool | float | str] = {
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "glu_linear_offset": 0.0,
    "multi_latent_attention": False,
    "openai_gelu": False,
    "qk_l2_norm": False,
    "quick_geglu": False,
    "softmax_type": "vanilla",
    "use_mup": False,
}
BEYOND = "beyond_gpt_model"  # the argument in which a written checkpoint says what they lack
ATTENTION = "*"  # a layer that attends, in the pattern of a HybridModel
ROTARY = ("rotary_", "rope_scaling", "use_rope_scaling", "seq_len_interpolation_factor")
WHOLE = ("rotary_base", "rotary_seq_len_interpolation_factor")  # flags that take whole numbers


def refuse_parts(arch: Architecture, key: str, value: str, fix: str) -> None:
    """Refuse a mixture of experts, whose experts Megatron-LM's checkpoints stack on an axis, and a
    model with other parts than text, which they would leave out.

    Raises:
        ConfigError: the model has experts, or other parts.
    """
    if FAMILIES[arch.family].composite is not None:
        allowed = f"not for a model with other parts than text ({arch.family}): they are not built"
        raise ConfigError(key, value, allowed, fix)
    if arch.experts is not None:
        allowed = f"not for a mixture of experts ({arch.family}): their axis is not built"
        raise ConfigError(key, value, allowed, fix)


def model_facts(arch: Architecture) -> dict[str, Any]:
    """The settings that fix what the tensors of a GPTModel mean, in the words of
    ``TransformerConfig`` and GPTModel.
    """
    facts: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden,
        "ffn_hidden_size": arch.ffn,
        "num_attention_heads": arch.heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm" if arch.norm.kind == "rms" else "LayerNorm",
        "layernorm_epsilon": arch.norm.eps,
        "layernorm_zero_centered_gamma": arch.norm.plus_one,
        "position_embedding_type": "rope" if arch.ropes else "learned_absolute",
        "rotary_interleaved": False,
    }
    if len(arch.ropes) == 1:
        facts["rotary_base"] = arch.ropes[0].theta
        facts["rotary_percent"] = arch.ropes[0].share
        scaling = arch.ropes[0].scaling or {"type": None}
        # The other numbers of "llama3" are constants of Megatron-Core: those of Llama 3.1.
        facts["rope_scaling"] = scaling["type"] == "llama3"
        if facts["rope_scaling"]:
            facts["rope_scaling_factor"] = scaling["factor"]
        linear = scaling["type"] == "linear"
        facts["seq_len_interpolation_factor"] = scaling["factor"] if linear else 1.0
    return facts


def told_settings(folder: Path) -> dict[str, Any]:
    """All that a checkpoint tells about its model, in the words of Megatron-LM's args or of
    ``TransformerConfig``. The layers of a HybridModel are counted as those of a GPTModel.

    Args:
        folder: the folder with the index of the checkpoint.
    """
    told = {**told_args(folder), **_run_config(folder)}
    if told.get("group_query_attention") is False:
        told["num_query_groups"] = told.get("num_attention_heads")
    pattern = told.get("hybrid_layer_pattern") or told.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        told["num_layers"] = pattern.replace("|", "").count(ATTENTION)
    return told


def disagreements(folder: Path, arch: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """The settings that a checkpoint was trained with and ``arch`` does not have: name, value
    there and value here. Settings that the checkpoint does not tell are not compared.

    Args:
        folder: the folder with the index of the checkpoint.
        arch: the model that its tensors are taken for.
    """
    told = told_settings(folder)
    if told.get("position_embedding_type") != "rope":
        told = {key: one for key, one in told.items() if not key.startswith(ROTARY)}
    if not told.get("use_rope_scaling", told.get("rope_scaling")):
        told.pop("rope_scaling_factor", None)  # its default, which is not used
    for word, here in model_facts(arch).items():
        for name in names_of(word):
            there = told.get(name)
            if isinstance(there, bool | int | float | str) and not _same(there, here):
                yield name, there, here
    for name, here in NEUTRAL.items():
        there = told.get(name)
        if isinstance(there, bool | int | float | str) and there != here:
            yield name, there, here
    if told.get("use_rope_scaling", told.get("rope_scaling")) and len(arch.ropes) == 1:
        here = arch.ropes[0].scaling or {}
        for name, there in LLAMA3.items() if here.get("type") == "llama3" else ():
            if here.get(name, there) != there:
                yield name, there, here[name]
    yield from layer_disagreements(told, arch)
    # The vocabulary of the tokenizer, which that of config.json may exceed, and the rows.
    least, most = told.get("vocab_size"), told.get("padded_vocab_size")
    if isinstance(least, int) and arch.vocab < least:
        yield "vocab_size", least, arch.vocab
    if isinstance(most, int) and arch.vocab > most:
        yield "padded_vocab_size", most, arch.vocab


def names_of(word: str) -> tuple[str, ...]:
    """The names that a word of ``TransformerConfig`` may have in a checkpoint."""
    return (word, *(arg for arg, one in ARGS.items() if one == word))


def _same(there: bool | int | float | str, here: Any) -> bool:
    if isinstance(there, str) or isinstance(here, str):
        return bool(there == here)
    return math.isclose(there, here, rel_tol=1e-6)  # Megatron may have kept the number as fp32


def _run_config(folder: Path) -> dict[str, Any]:
    """The section ``model`` of the file of Megatron-Bridge, beside the tensors or one folder up.
    Later versions have the fields of ``TransformerConfig`` one level down.
    """
    for place in (folder, folder.parent):
        path = place / RUN_CONFIG
        try:
            if path.is_file() and path.stat().st_size <= RUN_CONFIG_BYTES:
                model = read_yaml(path.read_bytes()).get("model")
                fields = model if isinstance(model, dict) else {}
                inner = fields.get("transformer")
                return {**inner, **fields} if isinstance(inner, dict) else fields
        except (OSError, ValueError, AttributeError):
            return {}
    return {}


def megatron_args(arch: Architecture, padded_vocab: int) -> dict[str, Any]:
    """The arguments of Megatron-LM for a model, and the layout of its checkpoint.

    Args:
        arch: the model.
        padded_vocab: rows of the stored embedding.
    """
    words = {word: arg for arg, word in ARGS.items()}
    every_bias = arch.attention_bias and arch.attention_out_bias and arch.mlp_bias
    args = {words.get(word, word): value for word, value in model_facts(arch).items()}
    for name in WHOLE:
        if float(args.get(name, 0.5)).is_integer():
            args[name] = int(args[name])
    return args | {
        "group_query_attention": arch.kv_heads != arch.heads,
        "max_position_embeddings": arch.max_positions,
        "padded_vocab_size": padded_vocab,
        "untie_embeddings_and_output_weights": not arch.tied,
        "add_bias_linear": every_bias,
        "add_qkv_bias": arch.attention_bias and not every_bias,
        "qk_layernorm": arch.qk_norm == "head",
        "swiglu": arch.gated and arch.activation == "silu",
        "squared_relu": not arch.gated and arch.activation == "relu2",
        "bias_gelu_fusion": every_bias and arch.activation == "gelu_tanh",
        BEYOND: beyond_gpt_model(arch) or None,
        "bf16": arch.dtype == torch.bfloat16,
        "fp16": arch.dtype == torch.float16,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }


def beyond_gpt_model(arch: Architecture) -> list[str]:
    """What Megatron-LM has no arguments for, in words: a GPTModel that its arguments make computes
    another function with the tensors of such a model.
    """
    layers = [arch.layer(index) for index in range(arch.num_layers)]
    biases = (arch.attention_bias, arch.attention_out_bias, arch.mlp_bias)
    nonlinearity = (arch.activation, arch.gated)
    facts = {
        "norms in other places": arch.post_norms or not arch.pre_norms,
        "a parallel residual": arch.parallel_residual,
        "factors or caps": (
            (arch.attention_scale, arch.attention_cap, arch.logit_cap) != (None, None, None)
            or (arch.logit_scale, arch.embedding_scale, arch.residual_scale) != (1, 1, 1)
        ),
        "windows": any(layer.window is not None for layer in layers),
        "layers without rotation": bool(arch.ropes) and any(layer.rope is None for layer in layers),
        "several rotary embeddings": len(arch.ropes) > 1,
        "this scaling of the rotary embedding": _has_own_scaling(arch),
        "a norm of all queries together": arch.qk_norm == "all heads",
        "some biases": len(set(biases)) > 1 and biases != (True, False, False),
        "this activation": (
            nonlinearity not in (("silu", True), ("relu2", False), ("gelu", False))
            and not (nonlinearity == ("gelu_tanh", False) and all(biases))
        ),
        "experts": arch.experts is not None,
    }
    return [name for name, holds in facts.items() if holds]


def _has_own_scaling(arch: Architecture) -> bool:
    """Whether the rotation is scaled with other numbers than the arguments of Megatron-LM express:
    the constants of Llama 3.1 beside the factor, and whole linear factors.
    """
    scaling = arch.ropes[0].scaling if len(arch.ropes) == 1 else None
    if scaling is None:
        return False
    if scaling["type"] == "llama3":
        return any(scaling.get(key, one) != one for key, one in LLAMA3.items())
    return scaling["type"] != "linear" or scaling["factor"] != int(scaling["factor"])


def flags_beside(arch: Architecture) -> list[str]:
    """The flags that Megatron-LM needs to load a written checkpoint: ``--use-checkpoint-args``, and
    what it does not take from the checkpoint.
    """
    args = megatron_args(arch, arch.vocab)
    flags = ["--use-checkpoint-args", f"--norm-epsilon {args['norm_epsilon']}"]
    if args["qk_layernorm"]:
        flags.append("--qk-layernorm")
    if args["add_bias_linear"] and arch.activation == "gelu":
        flags.append("--no-bias-gelu-fusion")  # the fused pass has the tanh form
    if args.get("use_rope_scaling"):
        flags.append(f"--use-rope-scaling --rope-scaling-factor {args['rope_scaling_factor']}")
    factor = args.get("rotary_seq_len_interpolation_factor", 1)
    return flags + ([f"--rotary-seq-len-interpolation-factor {factor}"] if factor != 1 else [])
