"""The kinds of results that a report shows beside perplexities, each a file of the run folder.

A new kind is a file with a ``ResultKind`` in it, and a line in ``KINDS``, whose order is the order
of the report. It imports matplotlib in the function that draws a picture, and not before.
"""

from __future__ import annotations

from pathlib import Path

from megamask.report.domains_table import DOMAINS
from megamask.report.own_rows import NO_MASKS, OwnMasks
from megamask.report.result_table import ResultKind, ResultTable
from megamask.report.sensitivity_table import SENSITIVITY
from megamask.report.speed_results import SPEED
from megamask.report.tasks_table import TASKS

KINDS: tuple[ResultKind, ...] = (
    TASKS,
    DOMAINS,
    SENSITIVITY,
    SPEED,
)


def read_result_tables(run_dir: Path, own: OwnMasks = NO_MASKS) -> list[ResultTable]:
    """The tables of all results that the run folder holds, in the order of ``KINDS``.

    Args:
        run_dir: the run folder.
        own: the masks of the run.

    Raises:
        ArtifactError: a file holds something else than its verb writes.
    """
    found = []
    for kind in KINDS:
        path = run_dir / kind.file
        if path.exists():
            found.append(kind.read(path, own))
    return found
