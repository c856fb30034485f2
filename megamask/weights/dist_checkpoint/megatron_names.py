"""Names of tensors in the checkpoints of Megatron-LM, Megatron-Bridge and NeMo.

Megatron-Core keeps a norm together with the linear behind it, as Transformer Engine's fused module
does: the local spec renames ``input_layernorm.`` to ``self_attention.linear_qkv.layer_norm_``, and
``pre_mlp_layernorm.`` to ``mlp.linear_fc1.layer_norm_`` (``sharded_state_dict_keys_map`` in
megatron/core/models/gpt/gpt_layer_specs.py), so a checkpoint of either spec loads into both. Older
checkpoints of the local spec have the names of its modules, which megamask's own weights have too.
The norms behind a linear of Gemma-2 and Gemma-3 are ``post_layernorm`` in Megatron-Bridge
(src/megatron/bridge/models/gemma/gemma3_bridge.py).

Layers that are alike may be stacked: a single tensor ``decoder.layers.mlp.linear_fc2.weight`` with
an axis of layers before the others, which is Megatron's default, in the place of
``decoder.layers.0.mlp.linear_fc2.weight`` and so on (``non_homogeneous_layers`` in
megatron/core/transformer/transformer_block.py). The halves of a gated linear may be two tensors
with the endings ``_w`` and ``_v`` (``apply_swiglu_sharded_factory`` in
megatron/core/transformer/mlp.py).

A HybridModel, which is to replace GPTModel, numbers attention and feed-forward parts as layers of
their own: with the pattern ``*-*-``, layer 1 of a GPTModel is the layers 2 and 3. Its last norm is
``decoder.final_norm``, and its layers are never stacked
(megatron/core/dist_checkpointing/gpt_checkpoint_interop.py).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from megamask.weights.rule import Rule

EMBEDDING = "embedding.word_embeddings.weight"
LAST_NORM, HYBRID_NORM = "decoder.final_layernorm.", "decoder.final_norm."
FEED_FORWARD = ("mlp.", "pre_mlp_layernorm.", "mlp_bda.")  # the second layer of a pair
# name in a GPTModel of ours -> name in Megatron's checkpoints
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attn_bda.norm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.norm.": "mlp.linear_fc2.post_layernorm.",
}
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")
# Beginnings and endings of names that are no weights: the state of a training run, buffers that
# follow from the settings, and what modules keep beside their weights.
_TRAINING = re.compile(
    r"(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state_machine|scheduler)\b"
)
_BESIDE = re.compile(r"_extra_state(/|$)|rotary_pos_emb\.inv_freq$")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a checkpoint.

    Attributes:
        keys: the stored tensors, whose rows follow one another.
        layer: index on the axis of layers that they begin with; None without that axis.
    """

    keys: tuple[str, ...]
    layer: int | None = None


def is_weight(key: str) -> bool:
    """Whether a stored tensor is a part of the model."""
    return not _TRAINING.match(key) and not _BESIDE.search(key)


def prefixes(keys: Iterable[str]) -> list[str]:
    """The beginnings of names before those of a GPTModel, one for each model that is stored: none
    in Megatron-LM, ``model.`` or ``module.`` in NeMo.
    """
    return [key.removesuffix(EMBEDDING) for key in keys if key.endswith(EMBEDDING)]


def fused_name(name: str) -> str:
    """The name of a tensor in Megatron's checkpoints, with the number of its layer."""
    for ours, theirs in FUSED.items():
        name = re.sub(rf"^(decoder\.layers\.\d+\.){re.escape(ours)}", rf"\g<1>{theirs}", name)
    return name


def stacked_name(name: str) -> tuple[str, int | None]:
    """The name of the stacked tensor, and the layer in it; None outside of the layers."""
    found = _LAYER.match(name)
    if found is None:
        return name, None
    return name[: found.end(1)] + name[found.end() :], int(found[2])


def hybrid_name(name: str) -> str:
    """The name of a tensor of a GPTModel in a HybridModel."""
    found = _LAYER.match(name)
    if found is None:
        return name.replace(LAST_NORM, HYBRID_NORM)
    rest = name[found.end() :]
    return f"{found[1]}{2 * int(found[2]) + rest.startswith(FEED_FORWARD)}.{rest}"


def place_of(rule: Rule, prefix: str, stored: Container[str]) -> Place | None:
    """Where the tensor of a rule lies among the names ``stored``; None if it is missing."""
    names = [fused_name(rule.megatron), rule.megatron]
    if f"{prefix}{HYBRID_NORM}weight" in stored:
        names = [hybrid_name(name) for name in names]
    for name in names:
        whole, (stacked, layer) = prefix + name, stacked_name(name)
        for key, index in ((whole, None), (prefix + stacked, layer)):
            ways = [(key,), *([(f"{key}_w", f"{key}_v")] if rule.kind == "gated" else [])]
            for keys in ways:
                if all(one in stored for one in keys):
                    return Place(keys, index)
    return None
