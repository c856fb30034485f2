"""The mapping table of an architecture: one list of rules for weights, masks, indices and logits,
in both directions.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from megamask.errors import ConfigError
from megamask.weights.families import FAMILIES
from megamask.weights.family import Architecture
from megamask.weights.rule import Read, Rule, block

__all__ = [
    "Read",
    "Rule",
    "block",
    "check_tp",
    "expected_tensors",
    "linear_shapes",
    "prunable",
    "rules",
]


def rules(arch: Architecture, padded_vocab: int | None = None) -> list[Rule]:
    """The table of ``arch``. ``padded_vocab`` >= vocab adds rows of zeros to embedding and head in
    Megatron.
    """
    assert padded_vocab is None or padded_vocab >= arch.vocab
    return FAMILIES[arch.family].rules(arch, padded_vocab or arch.vocab)


def expected_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an HF checkpoint of ``arch`` holds."""
    return {
        name: shape
        for rule in rules(arch)
        for name, shape in zip(rule.hf, rule.shapes, strict=True)
    }


def linear_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """HF module name and (O, I) of every linear that may be pruned."""
    return {
        name: shape
        for rule in rules(arch)
        if rule.is_linear
        for name, shape in zip(rule.modules, rule.shapes, strict=True)
    }


def check_tp(arch: Architecture, tp: int) -> None:
    """Check that heads, KV heads and FFN split over ``tp`` ranks. The vocabulary may be padded, so
    it is not checked.

    Raises:
        ConfigError: naming parallel.tp and the values that work.
    """
    sizes = {
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "intermediate_size": arch.ffn,
    }
    bad = [f"{name} = {size}" for name, size in sizes.items() if size % tp]
    if bad:
        works = [
            one
            for one in range(1, arch.kv_heads + 1)
            if not any(size % one for size in sizes.values())
        ]
        allowed = f"must divide {', '.join(bad)}; this model allows {', '.join(map(str, works))}"
        raise ConfigError(
            "parallel.tp", tp, allowed, f"Set parallel.tp={works[-1]} or another of these."
        )


def prunable(arch: Architecture, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """HF module names of the linears that get a mask, in model order.

    Args:
        arch: the model.
        include: shell-style patterns of the linears to prune.
        exclude: patterns of those of them that stay dense.

    Raises:
        ConfigError: a pattern that matches nothing, nothing left to prune, or a part of a fused
            linear kept dense.
    """
    names = list(linear_shapes(arch))
    for key, patterns in (("model.include", include), ("model.exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
                fix = f"The nearest one is {near}. Embeddings, norms and the head are never pruned and need no pattern."
                raise ConfigError(key, pattern, "a pattern that matches at least one linear", fix)
    chosen = {name for name in names if _matches(name, include) and not _matches(name, exclude)}
    if not chosen:
        raise ConfigError(
            "model.exclude",
            list(exclude),
            "must leave at least one linear to prune",
            "Remove a pattern.",
        )
    _refuse_split_fusions(arch, chosen)
    return [name for name in names if name in chosen]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_split_fusions(arch: Architecture, chosen: set[str]) -> None:
    for rule in rules(arch):
        dense = [name for name in rule.modules if name not in chosen]
        if rule.is_linear and 0 < len(dense) < len(rule.modules):
            kept = ", ".join(dense)
            raise ConfigError(
                "model.exclude",
                kept,
                f"Megatron fuses {', '.join(rule.modules)} into one linear: prune all of them or none",
                f"Exclude all of them, or also prune {kept}.",
            )
