"""The table of the study of domains: masks of single domains against one mask for all (MaskLLM,
Tables 4 and 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.report.own_rows import NO_MASKS, OwnMasks
from megamask.report.result_table import ResultKind, ResultTable
from megamask.report.results_table import format_protocol, method_label
from megamask.storage import is_number, lacks, read_json

FIX = "Run python -m studies.domains again."
DOMAINS_FILE = "domains.json"
FACTS: dict[str, Any] = {
    "domain": str,
    "pattern": str,
    "steps": dict,
    "tokens_per_step": int,
    "perplexity": {"dense": (int, float)},
    "protocol": dict,
}
OF_THE_DOMAIN = {"domain", "perplexity", "protocol"}  # all other facts are of the whole study


def domains_cells(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: a row for each domain, with the perplexity of every mask and the
    masks whose perplexity is at most that of the dense model.

    Args:
        found: the content of ``domains.json``, a mapping for each domain.
    """
    methods = list(dict.fromkeys(name for known in found for name in known["perplexity"]))
    rows = []
    for known in found:
        perplexity = known["perplexity"]
        values = (perplexity.get(method) for method in methods)
        shown = ("–" if value is None else f"{value:,.2f}" for value in values)
        below = [
            name
            for name, value in perplexity.items()
            if name != "dense" and value is not None and value <= perplexity["dense"]
        ]
        rows.append([known["domain"], *shown, ", ".join(below) or "none"])
    return ["domain", *map(method_label, methods), "at or below dense"], rows


def read_domains(path: Path, _: OwnMasks = NO_MASKS) -> ResultTable:
    """The table of a ``domains.json``, whose masks are those of other runs.

    Raises:
        ArtifactError: the file holds something else than the study writes, or rows of two studies.
    """
    found = read_json(path, FIX)
    if not isinstance(found, list) or not found:
        raise ArtifactError(path, "holds no list of domains", FIX)
    for known in found:
        if problem := lacks(known, FACTS):
            raise ArtifactError(path, problem, FIX)
        for name, value in known["perplexity"].items():
            if value is not None and not is_number(value, above=0):
                problem = f"holds no number at {known['domain']}.perplexity.{name}"
                raise ArtifactError(path, problem, FIX)
    if any(_of_study(known) != _of_study(found[0]) for known in found):
        raise ArtifactError(path, "holds rows of two studies, which do not compare", FIX)
    header, cells = domains_cells(found)
    steps = format_protocol({"steps": found[0]["steps"]})
    notes = [
        f"Held-out perplexity at {found[0]['pattern']}; {steps}, of "
        f"{found[0]['tokens_per_step']:,} tokens.",
        *(f"Protocol of {one['domain']}: {format_protocol(one['protocol'])}." for one in found),
    ]
    rows = [(known["domain"], row) for known, row in zip(found, cells, strict=True)]
    return ResultTable("Domains", header, rows, notes)


DOMAINS = ResultKind(DOMAINS_FILE, read_domains)


def _of_study(known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in known.items() if key not in OF_THE_DOMAIN}
