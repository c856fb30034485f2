"""The table of results: perplexity by method and domain, with the dense value, the distance from
the dense model, and the protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megamask.masks.identity import WAYS
from megamask.tables import table

METHOD_LABELS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "gblm": "GBLM",
    "pruner_zero": "Pruner-Zero",
    "sparsegpt": "SparseGPT mask",
    "sparsegpt_update": "SparseGPT + weight update",
    "admm": "ADMM mask",
    "admm_update": "ADMM + weight update",
    "learned": "learned mask",
}


def base_method(row: str) -> str:
    """The method of a row: of ``wanda, polished`` it is ``wanda``; of other rows their name."""
    method, *ways = row.split(", ")
    return method if set(ways) <= set(WAYS) else row


def method_label(row: str) -> str:
    """The name of a row in tables and pictures."""
    method = base_method(row)
    return METHOD_LABELS.get(method, method) + row.removeprefix(method)


def best_one_shot(values: Mapping[str, float]) -> str | None:
    """The row with the least value among the one-shot masks that leave the kept weights as they
    are, to compare a learned mask with; None where there is none.
    """
    rows = [
        row
        for row in values
        if (method := base_method(row)) in METHOD_LABELS
        and method not in ("dense", "learned")
        and not method.endswith("_update")
    ]
    return min(rows, key=values.__getitem__, default=None)


def methods_in_order(results: dict[str, Any]) -> list[str]:
    """The methods of ``results["perplexity"]`` in the order of rows and bars.

    The order is: dense, the one-shot methods, methods of other names, learned.
    """
    return methods_first(results.get("perplexity", {}))


def methods_first(present: Collection[str]) -> list[str]:
    """``present`` in the order of rows: the methods of the program, others, learned."""
    others = [method for method in present if method not in METHOD_LABELS]
    known = [method for method in METHOD_LABELS if method in present]
    return known[:-1] + others + known[-1:] if known and known[-1] == "learned" else known + others


def domains_of(results: dict[str, Any]) -> list[str]:
    """The domains in order of appearance."""
    rows = results.get("perplexity", {}).values()
    return list(dict.fromkeys(domain for by_domain in rows for domain in by_domain))


def patterns_that_differ(results: dict[str, Any]) -> dict[str, str]:
    """Row -> the pattern of its mask, where the rows have several; {} where all have one."""
    found: dict[str, str] = results.get("pattern", {})
    return found if len(set(found.values())) > 1 else {}


def table_cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table as text. A column without any value is left out, and the column
    of patterns where all masks have one.
    """
    domains, methods = domains_of(results), methods_in_order(results)
    extras = [
        (title, results[key], show)
        for title, key, show in _EXTRAS
        if any(method in results.get(key, {}) for method in methods)
    ]
    distances = [(title, key, show) for title, key, show in _DISTANCES if results.get(key)]
    patterns = patterns_that_differ(results)
    header = ["method", *(["pattern"] if patterns else [])]
    for domain in domains:
        header += [f"{domain} perplexity", "x dense", *(title for title, _, _ in distances)]
    header += [title for title, _, _ in extras]
    rows = []
    for method in methods:
        row = [method_label(method), *([patterns.get(method, "–")] if patterns else [])]
        for domain in domains:
            row += [
                format_perplexity(_value(results, method, domain)),
                _ratio(results, method, domain),
            ]
            for _, key, show in distances:
                value = results[key].get(method, {}).get(domain)
                row.append("–" if value is None else show(value))
        row += [show(values[method]) if method in values else "–" for _, values, show in extras]
        rows.append(row)
    return header, rows


def format_table(results: dict[str, Any]) -> str:
    """The table as aligned Markdown, with the protocol and the times below it.

    Args:
        results: the content of ``results.json``: ``{"perplexity": {method: {domain: value}},
            "kl": likewise, "agreement": likewise, "protocol": …, "seconds": …, "density": …,
            "mask_bytes": …, "pattern": …}``. Only the perplexity is required.
    """
    notes = [
        ("Beside dense", format_distances(results)),
        ("Protocol", format_protocol(results.get("protocol", {}))),
        ("Seconds", format_stages(results)),
    ]
    return "\n".join(
        [*table(*table_cells(results)), *(f"\n{title}: {text}" for title, text in notes if text)]
    )


def format_protocol(protocol: dict[str, Any]) -> str:
    """The protocol in a line: ``window 512, tail dropped, tokens code 16,384 / english 16,384``.
    Of a SHA-256 the first 12 digits are shown.
    """
    shown = {
        key: _plain(_short(value)) if key.endswith("sha256") else _plain(value)
        for key, value in protocol.items()
    }
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def format_distances(results: dict[str, Any]) -> str:
    """What the columns of the distance from the dense model hold; empty where there are none."""
    words = {
        "kl": "KL, nats a token of KL(dense || masked)",
        "agreement": "top-1, share of targets with the dense model's most likely token",
    }
    return "; ".join(said for key, said in words.items() if results.get(key))


def format_stages(results: dict[str, Any]) -> str:
    """The seconds of the stages that are not rows of the table."""
    stages = {
        stage: value
        for stage, value in results.get("seconds", {}).items()
        if stage not in results.get("perplexity", {})
    }
    return ", ".join(f"{stage} {value:.0f}" for stage, value in stages.items())


def format_bytes(count: float) -> str:
    """A number of bytes for a reader: ``512 B``, ``33.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s"


_DISTANCES = (
    ("KL", "kl", _nats),
    ("top-1", "agreement", _percent),
)
_EXTRAS = (
    ("density", "density", _percent),
    ("mask file", "mask_bytes", format_bytes),
    ("time", "seconds", _seconds),
)


def _value(results: dict[str, Any], method: str, domain: str) -> float | None:
    value = results["perplexity"].get(method, {}).get(domain)
    return None if value is None else float(value)


def format_perplexity(value: float | None) -> str:
    """A perplexity in a table: two decimals below 1,000."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _ratio(results: dict[str, Any], method: str, domain: str) -> str:
    value = _value(results, method, domain)
    dense = _value(results, "dense", domain) if "dense" in results["perplexity"] else None
    return "–" if value is None or not dense else f"{value / dense:,.2f}"


def _short(digest: Any) -> Any:
    """The first 12 digits of a digest, or of each digest of a mapping."""
    if isinstance(digest, dict):
        return {key: _short(one) for key, one in digest.items()}
    return str(digest)[:12]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
