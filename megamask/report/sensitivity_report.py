"""The table and the picture of the sensitivity of layers or linears (MaskLLM, Figure 7)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from megamask.report.plot_style import INK, METHOD_COLORS, panels
from megamask.report.results_table import format_protocol
from megamask.tables import table


def sensitivity_table(results: Mapping[str, Any]) -> str:
    """The table as aligned Markdown, the most sensitive part first.

    Args:
        results: the content of ``sensitivity.json``.
    """
    dense, rows, kept = results["dense"], results["increase"], set(results["kept_dense"])
    domains = list(dense)
    lines = [
        [
            part,
            *(f"{rows[part][domain]:+.4f}" for domain in domains),
            f"{fmean(rows[part].values()):+.4f}",
            "dense" if part in kept else "",
        ]
        for part in results["ranked"]
    ]
    made = results["made_from"]
    words = ", ".join(f'"{part}"' for part in results["kept_dense"])
    return "\n".join(
        [
            *table(["pruned alone", *domains, "mean", "kept"], lines),
            "\nIncrease of the loss in nats a token when this part alone has the "
            f"{made['pattern']} mask of {made['method']}; dense: "
            + ", ".join(f"{domain} {dense[domain]:.4f}" for domain in domains)
            + ".",
            f"\nKept dense under sensitivity.keep_dense={results['keep_dense']:g}: "
            f"'model.exclude=[{words}]'",
            f"\nProtocol: {format_protocol(made['protocol'])}",
        ]
    )


def sensitivity_picture(
    parts: Sequence[str], rows: Mapping[str, Mapping[str, float]], kept: Collection[str]
) -> Figure:
    """A panel a domain: the increase of the loss over the parts in the order of the model; parts
    that the budget keeps dense are orange.
    """
    domains = list(next(iter(rows.values())))
    figure, all_axes = panels(len(domains), "part of the model, from the first layer on", 5.2)
    for axes, domain in zip(all_axes, domains, strict=True):
        colors = [INK if part in kept else METHOD_COLORS["sparsegpt"] for part in parts]
        axes.bar(range(len(parts)), [rows[part][domain] for part in parts], color=colors)
        axes.set_title(f"{domain}: loss increase (nats per token)")
    return figure
