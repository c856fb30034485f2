"""Masks of Hugging Face (HF) linears to and from this rank's shards of Megatron linears.

The mapping table of the weights converts the masks too. O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import Architecture
from megamask.weights.mapping import rules
from megamask.weights.rule import Rule, block


def linear_rules(arch: Architecture) -> dict[str, Rule]:
    """Megatron name -> rule, for the prunable linears."""
    return {rule.megatron.removesuffix(".weight"): rule for rule in rules(arch) if rule.is_linear}


def patterns_by_linear(plan: Mapping[str, Pattern], arch: Architecture) -> dict[str, Pattern]:
    """Megatron name -> pattern, for the linears of a plan by HF name. The parts of a fused linear
    have one pattern.
    """
    found = {
        name: [plan[module] for module in rule.modules if module in plan]
        for name, rule in linear_rules(arch).items()
    }
    return {name: own[0] for name, own in found.items() if own}


def local_shard(of_modules: Mapping[str, torch.Tensor], rule: Rule, mesh: Mesh) -> torch.Tensor:
    """This rank's shard (O, I) of a Megatron linear's masks or margins, from those of its HF
    parts.
    """
    whole = {name: of_modules[name] for name in rule.modules}
    return rule.shard(
        lambda name, rows, cols: block(whole[name.rpartition(".")[0]], rows, cols),
        mesh.tp_rank,
        mesh.tp,
    )


def mask_shard(masks: Mapping[str, torch.Tensor], rule: Rule, mesh: Mesh) -> torch.Tensor | None:
    """This rank's shard (O, I) of a Megatron linear's mask; an HF part that ``masks`` does not name
    keeps everything. None where no part is named.
    """
    if not any(module in masks for module in rule.modules):
        return None
    of_parts = {
        module: masks[module] if module in masks else torch.ones(shape, dtype=torch.bool)
        for module, shape in zip(rule.modules, rule.shapes, strict=True)
    }
    return local_shard(of_parts, rule, mesh)


def hf_shapes(names: Iterable[str], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """HF module name -> (O, I) of the parts of Megatron linears, in the order of the linears."""
    table = linear_rules(arch)
    return {
        module: shape
        for name in names
        for module, shape in zip(table[name].modules, table[name].shapes, strict=True)
    }


def gather_codes(
    codes_of: Mapping[str, Callable[[], torch.Tensor]], arch: Architecture, mesh: Mesh
) -> Iterator[tuple[str, torch.Tensor]]:
    """HF module name and whole codes, (O, G) on the CPU, of every linear. The main rank yields
    them; the other ranks yield nothing, and keep one shard at a time.

    All ranks must run through the iterator.

    Args:
        codes_of: Megatron name -> makes this rank's shard (O, G) of a number per group.
        arch: the architecture.
        mesh: process groups of this rank.
    """
    table = linear_rules(arch)
    for name, make in codes_of.items() if mesh.dp_rank == 0 else ():
        shards = mesh.gather_to_first(make())
        if shards:
            parts = table[name].to_hf(table[name].join(shards).cpu())
            yield from ((hf.rpartition(".")[0], part) for hf, part in parts.items())


def fold_masks(
    linears: Mapping[str, MaskedLinear],
    masks: Mapping[str, torch.Tensor] | None,
    arch: Architecture,
    mesh: Mesh,
) -> None:
    """Make every linear compute with its masked weight.

    A linear that ``masks`` does not name computes with its dense weight, also where it is a part of
    a Megatron linear whose other parts are named; None makes all linears dense.
    """
    table = linear_rules(arch)
    for name, linear in linears.items():
        linear.fold(None if masks is None else mask_shard(masks, table[name], mesh))
