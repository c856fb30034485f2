"""The mapping table of any architecture, from the names of its family.

Megatron's names are those of a GPTModel with the layer spec of ``megamask.model.spec``.
"""

from __future__ import annotations

from megamask.weights.family import Architecture, Experts, Names
from megamask.weights.rule import Kind, Rule


def tensor_rules(arch: Architecture, names: Names, padded_vocab: int) -> list[Rule]:
    """The table in the order of the model: embeddings, layers, final norm, head."""
    vocabulary = ((arch.vocab, arch.hidden),)

    def vocabulary_rule(megatron: str, hf: str) -> Rule:
        return Rule(megatron, (f"{hf}.weight",), "vocab", vocabulary, padded_rows=padded_vocab)

    table = [vocabulary_rule("embedding.word_embeddings.weight", names.embedding)]
    if names.positions:
        table.append(
            Rule(
                "embedding.position_embeddings.weight",
                (f"{names.positions}.weight",),
                "replicate",
                ((arch.max_positions, arch.hidden),),
            )
        )
    for layer in range(arch.num_layers):
        table += _layer_rules(arch, names, layer)
    table += _norm_rules("decoder.final_layernorm", names.final_norm, arch)
    if not arch.tied:
        table.append(vocabulary_rule("output_layer.weight", names.head))
    return table


def _layer_rules(arch: Architecture, names: Names, layer: int) -> list[Rule]:
    megatron, hf = f"decoder.layers.{layer}.", names.layer.format(layer)
    pre, post, experts = arch.pre_norms, arch.post_norms, arch.experts_of(layer)
    dense = _mlp_rules(arch, arch.ffn, f"{megatron}mlp.", hf, names.up, names.down)
    return [
        *_norm_rules(f"{megatron}input_layernorm", hf + names.attention_norm, arch, pre),
        *_attention_rules(arch, names, f"{megatron}self_attention.", hf),
        *_norm_rules(f"{megatron}self_attn_bda.norm", hf + names.attention_post_norm, arch, post),
        *_norm_rules(f"{megatron}pre_mlp_layernorm", hf + names.mlp_norm, arch, pre),
        *(dense if experts is None else _expert_rules(arch, experts, names, megatron, hf)),
        *_norm_rules(f"{megatron}mlp_bda.norm", hf + names.mlp_post_norm, arch, post),
    ]


def _norm_rules(megatron: str, hf: str, arch: Architecture, present: bool = True) -> list[Rule]:
    leaves = ("weight", "bias") if arch.norm.bias else ("weight",)
    return [
        Rule(f"{megatron}.{leaf}", (f"{hf}.{leaf}",), "replicate", ((arch.hidden,),))
        for leaf in leaves
        if present
    ]


def _attention_rules(arch: Architecture, names: Names, megatron: str, hf: str) -> list[Rule]:
    h, q, kv = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    by_head = names.qkv_by_head
    table = _linear(
        f"{megatron}linear_qkv",
        [hf + name for name in names.qkv],
        (q + 2 * kv,) if by_head else (q, kv, kv),
        h,
        "column" if by_head else "qkv",
        arch.attention_bias,
        arch.kv_heads,
    )
    if arch.qk_norm is not None:
        whole = arch.qk_norm == "all heads"
        for leaf, name, rows in (("q", names.query_norm, q), ("k", names.key_norm, kv)):
            table.append(
                Rule(
                    f"{megatron}{leaf}_layernorm.weight",
                    (f"{hf}{name}.weight",),
                    "column" if whole else "replicate",
                    ((rows if whole else arch.head_dim,),),
                )
            )
    out = f"{hf}{names.out}"
    table += _linear(f"{megatron}linear_proj", [out], (h,), q, "row", arch.attention_out_bias)
    return table


def _mlp_rules(
    arch: Architecture, ffn: int, megatron: str, hf: str, up: tuple[str, ...], down: str
) -> list[Rule]:
    """The rules of a feed-forward part of the width ``ffn``."""
    kind: Kind = "gated" if arch.gated else "column"
    rows, ups = (ffn,) * (2 if arch.gated else 1), [hf + name for name in up]
    out, bias = [f"{hf}{down}"], arch.mlp_bias
    return [
        *_linear(f"{megatron}linear_fc1", ups, rows, arch.hidden, kind, bias),
        *_linear(f"{megatron}linear_fc2", out, (arch.hidden,), ffn, "row", bias),
    ]


def _expert_rules(
    arch: Architecture, experts: Experts, names: Names, megatron: str, hf: str
) -> list[Rule]:
    """The router, the experts, and the expert of every token with its gate."""

    def whole(leaf: str, name: str, rows: int) -> Rule:
        shapes = ((rows, arch.hidden),)
        return Rule(f"{megatron}mlp.{leaf}", (f"{hf}{name}.weight",), "replicate", shapes)

    parts = [
        (f"experts.{number}", hf + names.expert.format(number), experts.ffn)
        for number in range(experts.count)
    ]
    table = [whole("router.weight", names.router, experts.count)]
    if experts.shared_ffn is not None:
        parts.append(("shared_expert", hf + names.shared_expert, experts.shared_ffn))
        table.append(whole("shared_gate.weight", names.shared_gate, 1))
    for place, stem, ffn in parts:
        there = f"{megatron}mlp.{place}."
        table += _mlp_rules(arch, ffn, there, stem, names.expert_up, names.expert_down)
    return table


def _linear(
    megatron: str,
    hf: list[str],
    rows: tuple[int, ...],
    columns: int,
    kind: Kind,
    bias: bool,
    kv_groups: int = 1,
) -> list[Rule]:
    """The rules of a linear: its weight and, with ``bias``, its bias.

    Args:
        megatron: name of the linear.
        hf: names of its HF linears: one for each part, or a single linear that holds all parts.
        rows: out_features of each part.
        columns: in_features.
        kind: how the weight is sharded and fused.
        bias: whether there is a bias.
        kv_groups: of a ``qkv`` linear.
    """
    parts = rows if len(hf) < len(rows) else ()
    whole = (sum(rows),) if parts else rows
    table = [
        Rule(
            f"{megatron}.weight",
            tuple(f"{name}.weight" for name in hf),
            kind,
            tuple((count, columns) for count in whole),
            is_linear=True,
            kv_groups=kv_groups,
            parts=parts,
        )
    ]
    if bias:
        table.append(
            Rule(
                f"{megatron}.bias",
                tuple(f"{name}.bias" for name in hf),
                # A row-parallel linear adds its bias after the sum over ranks: all hold all of it.
                "replicate" if kind == "row" else kind,
                tuple((count,) for count in whole),
                kv_groups=kv_groups,
                parts=parts,
            )
        )
    return table
