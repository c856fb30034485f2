"""A config.json from what a Megatron checkpoint tells about itself.

The settings of a GPTModel fix an ``Architecture``. A family of the registry can express it if its
config.json, written from the architecture and read back, is the same architecture; the first such
family is taken. Settings that no family here has, and settings that are missing, are refused by
name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamask.errors import ArtifactError, MegamaskError
from megamask.weights.architecture import parsed_architecture
from megamask.weights.dist_checkpoint.checkpoint_folder import RUN_CONFIG
from megamask.weights.dist_checkpoint.family_words import WRITERS
from megamask.weights.dist_checkpoint.layer_settings import UNSET
from megamask.weights.dist_checkpoint.megatron_args import (
    ATTENTION,
    BEYOND,
    NEUTRAL,
    names_of,
    told_settings,
)
from megamask.weights.family import Activation, Architecture, Norm, Rope
from megamask.weights.frequencies import LLAMA3

FIX = (
    "Write the config.json of the model in Hugging Face's words, and point model.hf at its folder."
)
# Settings whose other values a config.json may express, which is then needed -> the plain value.
PLAIN: dict[str, Any] = {
    **NEUTRAL,
    **UNSET,
    "rotary_interleaved": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "softmax_scale": None,
    "num_experts": None,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "rotary_scaling_factor": None,
    BEYOND: None,
}
# The classes of Megatron-Bridge that add nothing to a GPTModel, by the beginnings of their names.
BRIDGE = ("GPTModelProvider", "GPTModelConfig", "BridgeGPTModelConfig", "Llama", "Qwen2", "Qwen3")
ACTIVATIONS: dict[tuple[str, bool], Activation] = {  # name in Megatron-Bridge, whether gated
    ("silu", True): "silu",
    ("gelu", False): "gelu",
    ("squared_relu", False): "relu2",
}


class Told:
    """The settings that a checkpoint tells, under either of their names.

    Args:
        folder: the folder with the index of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._told = folder, told_settings(folder)
        if not self._told:
            problem = f"tells no settings of its model: it has no args and no {RUN_CONFIG}"
            raise ArtifactError(folder, problem, FIX)

    def get(self, word: str) -> Any:
        """The value of a setting; None where it is not told."""
        values = (self._told.get(name) for name in names_of(word))
        return next((value for value in values if value is not None), None)

    def need(self, kind: type, *words: str) -> Any:
        """The value of the first setting of ``words`` that is told.

        Raises:
            ArtifactError: none is told, or it has another type.
        """
        word = next((word for word in words if self.get(word) is not None), words[0])
        value = self.get(word)
        if value is None:
            raise ArtifactError(self.folder, f"does not tell {' or '.join(words)}", FIX)
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise self.refusal(word, value, f"{kind.__name__} is needed")
        return kind(value)

    def refusal(self, word: str, value: Any, problem: str) -> ArtifactError:
        """The error of a setting."""
        shown = value if isinstance(value, bool | int | float | str | list) else "an object"
        problem = f"was trained with {word} = {shown!r}; {problem}"
        model = self.get("hf_model_id")
        made = f" It was made from {model}." if isinstance(model, str) else ""
        return ArtifactError(self.folder, problem, FIX + made)


def derived_config(folder: Path) -> dict[str, Any]:
    """The content of a config.json for the model of a checkpoint.

    Args:
        folder: the folder with the index of the checkpoint.

    Raises:
        ArtifactError: a setting is not told, or no family of the registry has it.
    """
    told = Told(folder)
    _check_plain(told)
    arch = _architecture(told)
    for write in WRITERS:
        config = write(arch)
        try:
            found = parsed_architecture(config, folder / "config.json")
        except MegamaskError:  # the family refuses a value
            continue
        if _same(found, arch):
            return config
    words = "its norm, biases, activation, positions and widths of heads"
    raise ArtifactError(folder, f"has a model that no family expresses: {words}", FIX)


def _same(found: Architecture, arch: Architecture) -> bool:
    layers = tuple(found.layer(index) for index in range(found.num_layers))
    plain = tuple(arch.layer(index) for index in range(arch.num_layers))
    return layers == plain and replace(found, family="", layers=()) == arch


def _check_plain(told: Told) -> None:
    """Refuse what a plain GPTModel has not."""
    for word, plain in PLAIN.items():
        value = told.get(word)
        if value is not None and value != plain and not (value == 0 and plain is None):
            raise told.refusal(word, value, "the settings alone do not say what that means")
    pattern = told.get("hybrid_layer_pattern") or told.get("hybrid_override_pattern")
    if pattern is not None:
        pairs = str(pattern).replace("|", "")
        if pairs != f"{ATTENTION}-" * (len(pairs) // 2):
            problem = "only layers of attention and feed-forward part in turn, *-*-, are read"
            raise told.refusal("hybrid_layer_pattern", pattern, problem)
    name = str(told.get("_target_") or "").rpartition(".")[2]
    if name and not name.startswith(BRIDGE):
        raise told.refusal("_target_", name, "the class may change what the model computes")


def _architecture(told: Told) -> Architecture:
    """The architecture of the settings, without a family."""
    hidden, heads = told.need(int, "hidden_size"), told.need(int, "num_attention_heads")
    every_bias = told.need(bool, "add_bias_linear")
    norm = _norm(told)
    activation, gated = _activation(told, every_bias)
    width, untied = told.get("kv_channels"), told.get("untie_embeddings_and_output_weights")
    tied = told.need(bool, "share_embeddings_and_output_weights") if untied is None else not untied
    if bool(told.get("qk_layernorm")) and norm.kind != "rms":
        raise told.refusal("qk_layernorm", True, "only an RMSNorm of queries and keys is built")
    return Architecture(
        family="",
        num_layers=told.need(int, "num_layers"),
        hidden=hidden,
        ffn=told.need(int, "ffn_hidden_size"),
        heads=heads,
        kv_heads=told.need(int, "num_query_groups", "num_attention_heads"),
        head_dim=hidden // max(heads, 1) if width is None else told.need(int, "kv_channels"),
        # Megatron-LM's vocab_size may lack tokens that a tokenizer adds, and the rows that pad the
        # vocabulary take part in its softmax, so all rows count. Bridge tells the tokenizer's size.
        vocab=told.need(int, "padded_vocab_size", "vocab_size"),
        max_positions=told.need(int, "max_position_embeddings", "seq_length"),
        tied=tied,
        norm=norm,
        ropes=_ropes(told),
        attention_bias=every_bias or bool(told.get("add_qkv_bias")),
        attention_out_bias=every_bias,
        mlp_bias=every_bias,
        activation=activation,
        gated=gated,
        qk_norm="head" if told.get("qk_layernorm") else None,
        dtype=_dtype(told),
    )


def _norm(told: Told) -> Norm:
    name, eps = told.need(str, "normalization"), told.need(float, "layernorm_epsilon")
    if name not in ("RMSNorm", "LayerNorm"):
        raise told.refusal("normalization", name, "only RMSNorm and LayerNorm are built")
    plus_one = bool(told.get("layernorm_zero_centered_gamma"))
    return Norm("rms" if name == "RMSNorm" else "layer", eps, plus_one, bias=name == "LayerNorm")


def _ropes(told: Told) -> tuple[Rope, ...]:
    kind = told.need(str, "position_embedding_type")
    if kind == "learned_absolute":
        return ()
    if kind != "rope":
        problem = "only rope and learned_absolute are built"
        raise told.refusal("position_embedding_type", kind, problem)
    scaling: dict[str, Any] | None = None
    stretch = told.get("seq_len_interpolation_factor")
    if told.get("rope_scaling"):
        scaling = {"type": "llama3", "factor": told.need(float, "rope_scaling_factor"), **LLAMA3}
    if stretch is not None and stretch != 1:
        if scaling is not None:
            problem = "the scaling of Llama 3 is on as well"
            raise told.refusal("seq_len_interpolation_factor", stretch, problem)
        factor = told.need(float, "seq_len_interpolation_factor")
        scaling = {"type": "linear", "factor": factor}
    share = told.need(float, "rotary_percent")
    return (Rope(told.need(float, "rotary_base"), scaling, share),)


def _activation(told: Told, every_bias: bool) -> tuple[Activation, bool]:
    """The activation, and whether it is gated.

    Megatron's GELU is exact, but its pass that adds the bias too computes the tanh form.
    """
    given = told.get("activation_func")
    if given is not None:  # Megatron-Bridge
        path = given.get("_target_") if isinstance(given, dict) else given
        name, gated = str(path).rpartition(".")[2], bool(told.get("gated_linear_unit"))
        if (name, gated) not in ACTIVATIONS:
            raise told.refusal("activation_func", name, "this activation is not built")
        found, fusion = ACTIVATIONS[name, gated], "bias_activation_fusion"
    else:
        gated, squared = told.need(bool, "swiglu"), bool(told.get("squared_relu"))
        found, fusion = "silu" if gated else "relu2" if squared else "gelu", "bias_gelu_fusion"
    if found == "gelu" and every_bias and told.need(bool, fusion):
        found = "gelu_tanh"
    return found, gated


def _dtype(told: Told) -> torch.dtype:
    if told.get("bf16"):
        return torch.bfloat16
    return torch.float16 if told.get("fp16") else torch.float32
