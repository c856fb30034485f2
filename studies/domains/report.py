"""The table of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.report.domains_table import DOMAINS_FILE, domains_cells
from megamask.report.results_table import format_protocol
from megamask.storage import write_json, write_text
from megamask.tables import table
from studies.child import AGAIN
from studies.domains.runs import DOMAIN_WORDS, GENERAL_WORDS, STARTS, Study, results_of

NAME = "domains"


def write_report(study: Study, folder: Path) -> Path:
    """Write ``domains.md`` and ``domains.json``; return the path of the table.

    Raises:
        ArtifactError: no domain has results yet.
    """
    found = [known for domain in study.domains if (known := results_of(study, domain))]
    if not found:
        raise ArtifactError(study.out, "holds no results of a domain", AGAIN)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.md"
    write_text(path, "\n".join(page(study, found)) + "\n")
    write_json(folder / DOMAINS_FILE, found)
    return path


def code(words: Sequence[str]) -> str:
    """Settings as code."""
    return " ".join(f"`{word}`" for word in words)


def page(study: Study, found: list[dict[str, Any]]) -> list[str]:
    """The lines of the page."""
    steps, tokens = found[0]["steps"], found[0]["tokens_per_step"]
    starts = " and ".join(f"`{start}`" for start in STARTS)
    protocols = [f"- {one['domain']}: {format_protocol(one['protocol'])}" for one in found]
    return [
        "# Masks of single domains",
        "",
        f"Held-out perplexity at {found[0]['pattern']}. The general mask learned all domains for",
        f"{steps['general']} steps of {tokens:,} tokens with {code(GENERAL_WORDS)}.",
        f"{starts} learned one domain for {steps[STARTS[0]]} steps with",
        f"{code(DOMAIN_WORDS)}, from the one-shot mask and from the general mask.",
        "",
        *table(*domains_cells(found)),
        "",
        "Protocols:",
        "",
        *protocols,
        "",
        "Not done: " + ", ".join(sorted(set(study.domains) - {one["domain"] for one in found}))
        if len(found) < len(study.domains)
        else "All domains of the recipe are in the table.",
    ]
