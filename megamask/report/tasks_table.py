"""The table of tasks: a row of accuracies for the dense model and for every mask."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from megamask.errors import ArtifactError
from megamask.report.own_rows import OwnMasks
from megamask.report.result_table import ResultKind, ResultTable
from megamask.report.results_table import format_protocol, method_label, patterns_that_differ
from megamask.storage import is_number, is_text, read_object
from megamask.tables import table

FIX = "Run the verb tasks again."
TITLE = "Tasks"
NOTE = "Accuracies in percent; norm: log-likelihoods divided by the characters of the answer."


def tasks_table(results: dict[str, Any]) -> str:
    """The table as aligned Markdown, with the protocol below it. ``tasks_cells`` has the columns.

    Args:
        results: the content of ``tasks.json``: ``{"tasks": {row: {task: {metric: value}}},
            "groups": {group: [task or group]}, "protocol": …}``.
    """
    header, rows = tasks_cells(results)
    protocol = f"Protocol: {format_protocol(results.get('protocol', {}))}"
    return "\n".join([*table(header, rows), f"\n{NOTE}", f"\n{protocol}"])


def tasks_cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: a pair of columns for accuracy and accuracy of the answers' mean
    log-likelihood a character (norm) where a task has both, and the mean of the accuracies of the
    tasks. A group is its tasks again, so it has a column and no part in the mean. Masks of several
    patterns have a column with them.
    """
    rows, groups = results["tasks"], results.get("groups", {})
    columns = list(
        dict.fromkeys(
            (task, metric)
            for values in rows.values()
            for task, metrics in values.items()
            for metric in metrics
        )
    )
    titles = {"acc": "", "acc_norm": " norm"}
    header = [f"{task}{titles.get(metric, f' {metric}')}" for task, metric in columns]
    patterns = patterns_that_differ(results)
    lines = []
    for name, values in rows.items():
        found = [(metric, values.get(task, {}).get(metric)) for task, metric in columns]
        accuracies = [
            metrics["acc"]
            for task, metrics in values.items()
            if task not in groups and metrics.get("acc") is not None
        ]
        mean = _shown("acc", fmean(accuracies)) if accuracies else "–"
        pattern = [patterns.get(name, "–")] if patterns else []
        lines.append([method_label(name), *pattern, *(_shown(*one) for one in found), mean])
    return ["method", *(["pattern"] if patterns else []), *header, "mean"], lines


def read_tasks(path: Path, own: OwnMasks) -> ResultTable:
    """The table of a ``tasks.json``, without rows of other masks than those of the run.

    Raises:
        ArtifactError: see ``read_tasks_results``.
    """
    results, said = own.rows_of(path.name, "tasks", read_tasks_results(path), "tasks")
    if not results:
        return ResultTable(TITLE, [], [], said)
    header, cells = tasks_cells(results)
    protocol = format_protocol(results.get("protocol", {}))
    notes = [NOTE, f"Protocol: {protocol}." if protocol else "The protocol was not recorded."]
    rows = list(zip(results["tasks"], cells, strict=True))
    return ResultTable(TITLE, header, rows, [*said, *notes])


def read_tasks_results(path: Path) -> dict[str, Any]:
    """The content of a ``tasks.json``.

    Raises:
        ArtifactError: the file holds something else than the verb tasks writes.
    """
    results = read_object(path, FIX, {"tasks": dict})
    for key in ("groups", "protocol", "pattern"):
        if not isinstance(results.get(key, {}), dict):
            raise ArtifactError(path, f"holds no object at {key}", FIX)
    if not all(is_text(one) for one in results.get("pattern", {}).values()):
        raise ArtifactError(path, "holds no text at pattern", FIX)
    for name, tasks in results["tasks"].items():
        if not isinstance(tasks, dict) or not all(isinstance(one, dict) for one in tasks.values()):
            raise ArtifactError(path, f"holds no table at tasks.{name}", FIX)
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                if value is not None and not is_number(value):
                    problem = f"holds no number at tasks.{name}.{task}.{metric}"
                    raise ArtifactError(path, problem, FIX)
    return results


TASKS = ResultKind("tasks.json", read_tasks)


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if metric in ("acc", "acc_norm") else f"{value:,.4g}"
