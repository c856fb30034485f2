"""The results of a run that belong to one mask: the dense row and the rows that were measured on
this very mask, by its digest. No row of another mask is shown.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.config import RunPaths
from megamask.config.paths import DENSE
from megamask.config.published import without_places
from megamask.config.tree import PUBLISHED
from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet
from megamask.masks.identity import row_name, why_no_row_of
from megamask.report.own_rows import only_rows
from megamask.report.reading import read_results
from megamask.report.results_table import format_table
from megamask.report.tasks_table import TASKS, read_tasks_results, tasks_table

log = logging.getLogger(__name__)


def measured(
    paths: RunPaths, masks: MaskSet, model: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The files of results of a run, with the rows of one mask and of the dense model alone.

    Args:
        paths: of the run.
        masks: the mask.
        model: the digest of the base model, under its key; {} where it is not known.

    Returns:
        Name of the file -> its content; without files that have no row of the mask.

    Raises:
        ArtifactError: a file is damaged, or has a row under the name of the mask that was measured
            on another mask or model, or that does not say on which mask.
    """
    found = {}
    for protocol in ("heldout", *PUBLISHED):
        path = paths.results_under(protocol)
        if own := _own_rows(path, read_results(path), "perplexity", "evaluate", masks, model):
            found[path.name] = own
    path = paths.run_dir / TASKS.file
    if path.exists():
        content = read_tasks_results(path)
        if own := _own_rows(path, content, "tasks", "tasks", masks, model):
            found[path.name] = own
    return found


def table_of(name: str, content: dict[str, Any]) -> str:
    """The table of a file of results, with its protocol below."""
    return tasks_table(content) if name == TASKS.file else format_table(content)


def _own_rows(
    path: Path,
    results: dict[str, Any],
    table: str,
    verb: str,
    masks: MaskSet,
    model: Mapping[str, str],
) -> dict[str, Any]:
    rows = results.get(table, {})
    mine = [row for row in rows if not why_no_row_of(masks, results, row, model)]
    names = (masks.path.stem, masks.method, row_name(masks.method, masks.meta))
    other = [row for row in names if row in rows]
    if not mine and other:
        problem = f"has a row {other[0]} that {why_no_row_of(masks, results, other[0], model)}"
        fix = f"Run the verb {verb} again on {masks.path}, or delete the file."
        raise ArtifactError(path, problem, fix)
    if not mine:
        if rows:
            log.info("%s has no row of %s", path, masks.path)
        return {}
    found = only_rows(results, {DENSE, *mine}.__contains__)
    found.pop("seconds", None)
    if "mask_bytes" in found:  # of the file that is pushed, which may have another coding
        found["mask_bytes"] = dict.fromkeys(mine, masks.size)
    found |= {key: results[key] for key in ("protocol", "groups") if key in results}
    without_folders: dict[str, Any] = without_places(found)
    return without_folders
