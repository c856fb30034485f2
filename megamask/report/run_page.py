"""The page that compares runs: one HTML file that refers to no other file."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megamask.report.plot_style import save
from megamask.report.result_table import ResultTable
from megamask.report.run_facts import Comparison
from megamask.report.run_pictures import difference_sections, learning_sections, samples_section
from megamask.report.run_tables import (
    masks_table,
    perplexity_tables,
    runs_table,
    settings_table,
    tasks_tables,
    versions_table,
)
from megamask.report.template import COMPARISON


def comparison_sections(found: Comparison) -> list[ResultTable]:
    """The sections of the page, in order."""
    runs, masks = found.runs, masks_table(found.runs)
    samples = samples_section(runs)
    return [
        runs_table(runs),
        *perplexity_tables(runs),
        *tasks_tables(runs),
        *found.tables,
        settings_table(runs),
        *([samples] if samples else []),
        *learning_sections(runs),
        *difference_sections(runs),
        *([masks] if masks else []),
        versions_table(runs),
    ]


def render_comparison(found: Comparison, sections: Sequence[ResultTable]) -> str:
    """The page as HTML."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        COMPARISON
    )
    count = len(found.runs)
    return page.render(
        title=f"megamask: {count} run{'' if count == 1 else 's'} compared",
        subtitle=", ".join(run.name for run in found.runs),
        said=found.said,
        sections=[(section, _drawn(section)) for section in sections],
    )


def _drawn(section: ResultTable) -> list[dict[str, Any]]:
    """The texts of the pictures of a section, and the PNG files in base64."""
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        for picture in section.pictures:
            path = Path(folder) / "picture.png"
            save(picture.draw, path)
            data = base64.b64encode(path.read_bytes()).decode()
            texts = {"title": picture.title, "caption": picture.caption, "missing": ""}
            drawn.append({**texts, "data": data})
    return drawn
