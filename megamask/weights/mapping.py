"""The mapping table of an architecture.

The same list of rules converts weights, masks, candidate indices and mask logits between Hugging
Face (HF) and Megatron, in both directions.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from megamask.errors import ConfigError
from megamask.weights.families.registry import FAMILIES
from megamask.weights.family import Architecture
from megamask.weights.rule import Read, Rule, block
from megamask.weights.tensor_rules import tensor_rules

__all__ = [
    "Read",
    "Rule",
    "block",
    "check_tp",
    "expected_tensors",
    "linear_shapes",
    "prunable",
    "require_match",
    "rules",
]


def rules(arch: Architecture, padded_vocab: int | None = None) -> list[Rule]:
    """The mapping table of ``arch``, in the order of the model.

    Args:
        arch: the model.
        padded_vocab: number of rows of embedding and head in Megatron; the rows beyond the
            vocabulary are zeros. None adds no rows.
    """
    assert padded_vocab is None or padded_vocab >= arch.vocab
    return list(_table(arch, padded_vocab or arch.vocab))


@lru_cache(maxsize=8)
def _table(arch: Architecture, rows: int) -> tuple[Rule, ...]:
    """The rules, made once: a plan asks for them with every setting that it tries."""
    return tuple(tensor_rules(arch, FAMILIES[arch.family].names, rows))


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
    """Check that heads, KV heads and FFN split over ``tp`` ranks.

    Where there are more ranks than KV heads, a number of ranks shares each of them, as Megatron
    allows. A norm over all heads needs KV heads of its own on every rank. The vocabulary is not
    checked, because it may be padded.

    Raises:
        ConfigError: they do not split; the message names the values of parallel.tp that work.
    """
    bad = _unsplit(arch, tp)
    if bad:
        works = [number for number in range(1, arch.heads + 1) if not _unsplit(arch, number)]
        allowed = f"must divide {', '.join(bad)}; this model allows {', '.join(map(str, works))}"
        raise ConfigError(
            "parallel.tp", tp, allowed, f"Set parallel.tp={works[-1]} or another of these."
        )


def _unsplit(arch: Architecture, tp: int) -> list[str]:
    """The sizes that do not split over ``tp`` ranks, with their names in config.json."""
    sizes = {"num_attention_heads": arch.heads, **arch.widths()}
    bad = [f"{name} = {size}" for name, size in sizes.items() if size % tp]
    fused = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
    shares = arch.qk_norm != "all heads" and tp % arch.kv_heads == 0 and fused % tp == 0
    if arch.kv_heads % tp and not shares:
        bad.append(f"num_key_value_heads = {arch.kv_heads}")
    return bad


def prunable(
    arch: Architecture,
    include: Sequence[str],
    exclude: Sequence[str],
    exclude_sensitive: Sequence[str] = (),
) -> list[str]:
    """HF module names of the linears that get a mask, in model order.

    Args:
        arch: the model.
        include: shell-style patterns of the linears to prune.
        exclude: patterns of linears that stay dense although ``include`` matches them.
        exclude_sensitive: more of them, which ``model.exclude_sensitive`` came to.

    Raises:
        ConfigError: a pattern matches no linear, no linear is left to prune, or only a part of a
            fused linear is kept dense.
    """
    given = tuple(include), tuple(exclude), tuple(exclude_sensitive)
    return list(_prunable(arch, *given))


@lru_cache(maxsize=8)
def _prunable(
    arch: Architecture,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    exclude_sensitive: tuple[str, ...],
) -> tuple[str, ...]:
    names = list(linear_shapes(arch))
    for key, patterns in (
        ("model.include", include),
        ("model.exclude", exclude),
        ("model.exclude_sensitive", exclude_sensitive),
    ):
        for pattern in patterns:
            require_match(key, pattern, names)
    dense = (*exclude, *exclude_sensitive)
    chosen = {name for name in names if _matches(name, include) and not _matches(name, dense)}
    if not chosen:
        raise ConfigError(
            "model.exclude",
            list(dense),
            "must leave at least one linear to prune",
            "Remove a pattern.",
        )
    _refuse_split_fusions(arch, chosen)
    return tuple(name for name in names if name in chosen)


def require_match(key: str, pattern: str, names: Sequence[str]) -> None:
    """Check that a shell-style pattern of the setting ``key`` matches one of ``names``.

    Raises:
        ConfigError: it matches none; the message has the nearest name.
    """
    if not any(fnmatchcase(name, pattern) for name in names):
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
        fix = (
            f"The nearest name is {near}. "
            "Embeddings, norms and the head are never pruned and need no pattern."
        )
        raise ConfigError(key, pattern, "a pattern that matches at least one linear", fix)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_split_fusions(arch: Architecture, chosen: set[str]) -> None:
    for rule in rules(arch):
        dense = [name for name in rule.modules if name not in chosen]
        if rule.is_linear and 0 < len(dense) < len(rule.modules):
            excluded = ", ".join(dense)
            allowed = (
                f"Megatron fuses {', '.join(rule.modules)} into one linear: "
                "prune all of them or none"
            )
            fix = f"Exclude all of them, or also prune {excluded}."
            raise ConfigError("model.exclude", excluded, allowed, fix)
