"""Masks of Hugging Face (HF) linears to and from this rank's shards of Megatron linears.

The mapping table of the weights converts the masks too. O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture
from megamask.weights.mapping import rules
from megamask.weights.rule import Rule, block


def linear_rules(arch: Architecture) -> dict[str, Rule]:
    """Megatron name -> rule, for the prunable linears."""
    return {rule.megatron.removesuffix(".weight"): rule for rule in rules(arch) if rule.is_linear}


def local_mask(masks: Mapping[str, torch.Tensor], rule: Rule, mesh: Mesh) -> torch.Tensor:
    """This rank's shard (O, I) bool of a Megatron linear's mask, from the masks of its HF parts."""
    whole = {name: masks[name] for name in rule.modules}
    return rule.shard(
        lambda name, rows, cols: block(whole[name.rpartition(".")[0]], rows, cols),
        mesh.tp_rank,
        mesh.tp,
    )


def gather_masks(
    local: Mapping[str, torch.Tensor], arch: Architecture, mesh: Mesh
) -> dict[str, torch.Tensor]:
    """Whole masks by HF module name, (O, I) bool, from the shards of all ranks by Megatron name.

    All TP ranks must call this function.
    """
    table, whole = linear_rules(arch), {}
    for name, mask_OI in local.items():
        shards = mesh.gather_over_tp(mask_OI.to(torch.uint8))
        parts = table[name].to_hf(table[name].join(shards))
        whole.update({hf.rpartition(".")[0]: part.bool().cpu() for hf, part in parts.items()})
    return whole


def fold_masks(
    linears: Mapping[str, MaskedLinear],
    masks: Mapping[str, torch.Tensor] | None,
    arch: Architecture,
    mesh: Mesh,
) -> None:
    """Make every linear compute with its masked weight.

    A linear that ``masks`` does not name computes with its dense weight; None makes all linears
    dense.
    """
    table = linear_rules(arch)
    for name, linear in linears.items():
        mask_OI = None
        if masks is not None and table[name].modules[0] in masks:
            mask_OI = local_mask(masks, table[name], mesh)
        linear.fold(mask_OI)
