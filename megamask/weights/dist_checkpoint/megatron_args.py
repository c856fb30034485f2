"""The settings of a model in the words of Megatron-LM and Megatron-Bridge.

Megatron-LM keeps its command line as ``args`` in ``common.pt`` of a checkpoint, takes the shape of
the model from it with ``--use-checkpoint-args`` (``load_args_from_checkpoint`` in
megatron/training/checkpointing.py), and compares the sizes with its own. Megatron-Bridge keeps the
fields of its model provider, which are those of ``TransformerConfig``, under ``model`` in
``run_config.yaml``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megamask.config.yaml_text import read_yaml
from megamask.safe_checkpoint import told_args
from megamask.weights.family import Architecture

RUN_CONFIG = "run_config.yaml"
RUN_CONFIG_BYTES = 2**24  # a longer file is not read

# word of Megatron-LM's args -> word of TransformerConfig, where they differ
ARGS = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}


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
    return facts


def disagreement(folder: Path, arch: Architecture) -> tuple[str, Any, Any] | None:
    """The first setting that a checkpoint was trained with and ``arch`` does not have: its name,
    its value there and its value here. Settings that the checkpoint does not tell are not compared.

    Args:
        folder: the folder with the index of the checkpoint.
        arch: the model that its tensors are taken for.
    """
    told = {**told_args(folder), **_run_config(folder)}
    if told.get("group_query_attention") is False:
        told["num_query_groups"] = told.get("num_attention_heads")
    if told.get("position_embedding_type") != "rope":
        told = {key: one for key, one in told.items() if not key.startswith("rotary_")}
    names = {
        word: (word, *(arg for arg, one in ARGS.items() if one == word)) for word in ARGS.values()
    }
    for word, here in model_facts(arch).items():
        for name in names.get(word, (word,)):
            there = told.get(name)
            if isinstance(there, bool | int | float | str) and not _same(there, here):
                return name, there, here
    return None


def _same(there: bool | int | float | str, here: Any) -> bool:
    if isinstance(there, str) or isinstance(here, str):
        return bool(there == here)
    return math.isclose(there, here, rel_tol=1e-6)  # Megatron may have kept the number as fp32


def _run_config(folder: Path) -> dict[str, Any]:
    """The section ``model`` of the file of Megatron-Bridge, beside the tensors or one folder up."""
    for place in (folder, folder.parent):
        path = place / RUN_CONFIG
        try:
            if path.is_file() and path.stat().st_size <= RUN_CONFIG_BYTES:
                model = read_yaml(path.read_bytes()).get("model")
                return model if isinstance(model, dict) else {}
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
    if float(args.get("rotary_base", 0.5)).is_integer():
        args["rotary_base"] = int(args["rotary_base"])  # --rotary-base takes a whole number
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
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }
