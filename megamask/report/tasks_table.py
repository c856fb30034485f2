"""The table of tasks: a row of accuracies for the dense model and for every mask."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from megamask.report.results_table import format_protocol, method_label
from megamask.tables import table


def tasks_table(results: dict[str, Any]) -> str:
    """The table as aligned Markdown: a pair of columns for accuracy and accuracy of the answers'
    mean log-likelihood a byte (norm) where a task has both, and the mean of the accuracies of the
    tasks. A group is its tasks again, so it has a column and no part in the mean.

    Args:
        results: the content of ``tasks.json``: ``{"tasks": {row: {task: {metric: value}}},
            "groups": {group: [task or group]}, "protocol": …}``.
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
    lines = []
    for name, values in rows.items():
        found = [(metric, values.get(task, {}).get(metric)) for task, metric in columns]
        accuracies = [
            metrics["acc"]
            for task, metrics in values.items()
            if task not in groups and "acc" in metrics
        ]
        mean = _shown("acc", fmean(accuracies)) if accuracies else "–"
        lines.append([method_label(name), *(_shown(*one) for one in found), mean])
    return "\n".join(
        [
            *table(["method", *header, "mean"], lines),
            "\nAccuracies in percent; norm: log-likelihoods divided by the bytes of the answer.",
            f"\nProtocol: {format_protocol(results.get('protocol', {}))}",
        ]
    )


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if metric in ("acc", "acc_norm") else f"{value:,.4g}"
