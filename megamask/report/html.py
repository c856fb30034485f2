"""``report.html``: one file that holds tables and pictures and opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megamask.config import Config
from megamask.masks.file import load_masks
from megamask.report.reading import RunData, mask_provenance
from megamask.report.results_table import (
    best_one_shot,
    domains_of,
    format_bytes,
    format_distances,
    format_protocol,
    format_stages,
    method_label,
    methods_in_order,
    table_cells,
)
from megamask.report.template import PAGE
from megamask.storage import real_path
from megamask.weights.layer_plan import asked_patterns


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        section: heading that the picture stands under.
        title, caption: the texts of the picture.
        missing: the text that stands in place of a picture that is not there yet.
        path: the PNG file; None when the picture is not there yet.
    """

    section: str
    title: str
    caption: str
    missing: str
    path: Path | None


def render_report(config: Config, data: RunData, pictures: Sequence[Picture]) -> str:
    """The page as HTML that refers to no other file.

    Raises:
        ArtifactError: a file in the folder of masks is no mask file.
    """
    named = {"Perplexity": data.results}
    named |= {f"Perplexity, {protocol}": found for protocol, found in data.published.items()}
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        PAGE
    )
    sections = _sections(pictures)
    return page.render(
        title=f"megamask: {real_path(Path(config.run_dir)).name}",
        subtitle=_subtitle(config, data),
        said=data.said,
        findings=findings(data.results),
        tables=[_table(title, results) for title, results in named.items()],
        others=[(table, sections.pop(table.title, [])) for table in data.tables],
        sections=list(sections.items()),
        masks=[_mask_entry(method, path) for method, path in data.masks.items()],
        versions=data.versions,
        seeds=data.seeds,
        settings=data.settings,
    )


def findings(results: dict[str, Any]) -> list[str]:
    """A sentence for each domain: the learned mask beside dense and the best one-shot mask."""
    perplexity = results.get("perplexity", {})
    sentences = []
    for domain in domains_of(results):
        learned = perplexity.get("learned", {}).get(domain)
        dense = perplexity.get("dense", {}).get(domain)
        if not learned or not dense:
            continue
        sentence = (
            f"{domain}: the learned mask has perplexity {learned:,.2f}, "
            f"{learned / dense:.2f} times the dense model's {dense:,.2f}"
        )
        values = {row: value for row, one in perplexity.items() if (value := one.get(domain))}
        if best := best_one_shot(values):
            change = learned / values[best] - 1
            word = "below" if change < 0 else "above"
            sentence += (
                f" and {abs(change):.0%} {word} the best one-shot mask's "
                f"{values[best]:,.2f} ({method_label(best)})"
            )
        sentences.append(sentence + ".")
    return sentences


def _subtitle(config: Config, data: RunData) -> str:
    parts = [
        f"pattern {_patterns(config, data)}",
        f"base model {config.model.hf or config.model.gguf or 'of the run directory'}",
    ]
    if data.train:
        last = data.train[-1]
        minutes = last["seconds"] / 60
        parts.append(
            f"learned for {last['step']:,} steps, {last['tokens']:,} tokens, {minutes:,.1f} minutes"
        )
    return " · ".join(parts)


def _patterns(config: Config, data: RunData) -> str:
    """The patterns of the learned mask or, without it, of the first; those of the settings where
    the run has no mask.
    """
    for method in sorted(data.masks, key=lambda one: one != "learned"):
        return str(load_masks(data.masks[method]).patterns)
    return ", ".join(map(str, asked_patterns(config)))


def _sections(pictures: Sequence[Picture]) -> dict[str, list[dict[str, str]]]:
    """Heading -> the texts of its pictures, and the PNG files in base64."""
    by_section: dict[str, list[dict[str, str]]] = {}
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode() if picture.path else ""
        entry = {
            "title": picture.title,
            "caption": picture.caption,
            "missing": picture.missing,
            "data": data,
        }
        by_section.setdefault(picture.section, []).append(entry)
    return by_section


def _table(title: str, results: dict[str, Any]) -> dict[str, Any]:
    header, rows = table_cells(results)
    return {
        "title": title,
        "header": header,
        "rows": list(zip(methods_in_order(results), rows, strict=True)),
        "distances": format_distances(results),
        "protocol": format_protocol(results.get("protocol", {})),
        "stages": format_stages(results),
    }


def _mask_entry(method: str, path: Path) -> dict[str, Any]:
    provenance = mask_provenance(path)
    bits = provenance.get("bits per weight")
    return {
        "method": method,
        "label": method_label(method),
        "file": f"{path.parent.name}/{path.name}",
        "size": format_bytes(path.stat().st_size) + (f", {bits} bits a weight" if bits else ""),
        "provenance": provenance,
    }
