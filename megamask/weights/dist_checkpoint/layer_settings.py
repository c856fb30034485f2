"""What a Megatron checkpoint tells of the arithmetic within a layer, compared with config.json:
activation, norm of queries and keys, windows, layers without rotation, factor and cap of scores.
The tensors of a checkpoint show none of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megamask.weights.family import Architecture

# function of Megatron -> our activations that it may compute; "gelu" has a fused pass of tanh form
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "silu": ("silu",),
    "gelu": ("gelu", "gelu_tanh"),
    "fast_gelu": ("gelu_tanh",),
    "squared_relu": ("relu2",),
}
# Settings that no model of ours has -> the value that stands for none.
UNSET: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "experimental_attention_variant": None,
    "heterogeneous_block_specs": False,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
}
Difference = tuple[str, Any, Any]


def layer_disagreements(told: Mapping[str, Any], arch: Architecture) -> Iterator[Difference]:
    """The settings of layers that a checkpoint was trained with and ``arch`` does not have: name,
    value there and value here. Settings that the checkpoint does not tell are not compared.

    Args:
        told: all that the checkpoint tells.
        arch: the model that its tensors are taken for.
    """
    yield from _activation(told, arch)
    scale = arch.attention_scale or 1 / math.sqrt(arch.head_dim)
    numbers = {
        "softmax_scale": scale,
        "attn_logit_softcapping": arch.attention_cap or 0.0,
        "final_logit_softcapping": arch.logit_cap or 0.0,
    }
    for name, here in numbers.items():
        there = told.get(name)
        if isinstance(there, bool) or not isinstance(there, int | float):
            continue
        if not math.isclose(there, here, rel_tol=1e-6):
            yield name, there, here
    yield from _windows(told, arch)
    if arch.ropes and (found := _pattern(told.get("no_rope_freq"), arch, every=True)) is not None:
        here_layers = [arch.layer(index).rope is None for index in range(arch.num_layers)]
        if found != here_layers:
            yield "no_rope_freq", told["no_rope_freq"], _shown(here_layers)
    yield from ((name, told[name], None) for name in UNSET if told.get(name))


def _activation(told: Mapping[str, Any], arch: Architecture) -> Iterator[Difference]:
    flags = {
        "swiglu": arch.gated and arch.activation == "silu",
        "squared_relu": not arch.gated and arch.activation == "relu2",
        "gated_linear_unit": arch.gated,
    }
    if arch.qk_norm != "all heads":  # which Megatron has no word for
        flags["qk_layernorm"] = arch.qk_norm == "head"
    every_bias = arch.attention_bias and arch.attention_out_bias and arch.mlp_bias
    given = told.get("activation_func")
    if every_bias and not arch.gated and arch.activation in FUNCTIONS["gelu"]:
        is_bridge = given is not None
        flags["bias_activation_fusion" if is_bridge else "bias_gelu_fusion"] = (
            arch.activation == "gelu_tanh"
        )
    for name, here in flags.items():
        there = told.get(name)
        if isinstance(there, bool) and there != here:
            yield name, there, here
    if given is not None:
        path = given.get("_target_") if isinstance(given, dict) else given
        name = str(path).rpartition(".")[2]
        if arch.activation not in FUNCTIONS.get(name, ()):
            yield "activation_func", name, arch.activation


def _windows(told: Mapping[str, Any], arch: Architecture) -> Iterator[Difference]:
    """Megatron's window counts the keys before a query, some converters write that of Hugging Face,
    which counts the query's own too, so both are taken.
    """
    there = told.get("window_size")
    left = there[0] if isinstance(there, list | tuple) and there else there
    if not isinstance(left, int) or isinstance(left, bool):
        return
    windows = [arch.layer(index).window for index in range(arch.num_layers)]
    sizes = {one for one in windows if one is not None}
    if left < 0 or not sizes:
        if sizes or left >= 0:
            yield "window_size", there, sorted(sizes) or None
        return
    if not sizes <= {left, left + 1}:
        yield "window_size", there, sorted(sizes)
    skips = told.get("window_attn_skip_freq")
    found = [True] * arch.num_layers
    if isinstance(skips, int) and skips > 0:
        found = [bool((index + 1) % skips) for index in range(arch.num_layers)]
    elif (listed := _pattern(skips, arch, every=False)) is not None:
        found = listed
    here = [window is not None for window in windows]
    if found != here:
        yield "window_attn_skip_freq", skips, _shown(here)


def _pattern(value: Any, arch: Architecture, every: bool) -> list[bool] | None:
    """Layer by layer: a list as it is, and with ``every`` also each layer whose number a whole
    number divides; None where nothing is told.
    """
    if isinstance(value, list | tuple):
        return [bool(one) for one in value]
    if every and isinstance(value, int) and value > 0:
        return [(index + 1) % value == 0 for index in range(arch.num_layers)]
    return None


def _shown(layers: list[bool]) -> list[int]:
    return [int(one) for one in layers]
