"""The picture of the sensitivity of layers or linears (MaskLLM, Figure 7)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from matplotlib.figure import Figure

from megamask.report.plot_style import INK, METHOD_COLORS, panels


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
