"""Pictures of held-out perplexity: while learning, and by method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megamask.report.plot_style import (
    INK,
    FloatArray,
    label_right,
    log_scale,
    method_color,
    number,
    numbers,
    panels,
    short_number,
    tokens_seen,
)
from megamask.report.reading import Record
from megamask.report.results_table import domains_of, method_label, methods_in_order


def perplexity_picture(evaluations: Sequence[Record], results: dict[str, Any]) -> Figure:
    """Held-out perplexity of the hard mask against tokens seen, a panel for each domain.

    Level lines show the other methods of ``results``. A level far above the curve is only named at
    the upper edge, because its line would squeeze the rest of the panel.
    """
    domains = list(
        dict.fromkeys(domain for record in evaluations for domain in record["perplexity"])
    )
    figure, axes_list = panels(len(domains), "tokens seen", width=5.6, height=3.8)
    for axes, domain in zip(axes_list, domains, strict=True):
        values = numbers(record["perplexity"].get(domain) for record in evaluations)
        levels = {
            method: number(results["perplexity"][method].get(domain))
            for method in methods_in_order(results)
            if method != "learned"
        }
        axes.plot(
            tokens_seen(evaluations),
            values,
            color=INK,
            marker="o",
            markersize=4,
            linewidth=2,
            clip_on=False,
            zorder=3,
        )
        axes.set_xlim(left=0)
        axes.set_title(f"Held-out perplexity: {domain}", loc="left")
        _draw_levels(
            axes,
            values[np.isfinite(values)],
            {method: value for method, value in levels.items() if math.isfinite(value)},
        )
    return figure


def _draw_levels(axes: Axes, curve: FloatArray, levels: dict[str, float]) -> None:
    """Draw level lines and the names of all lines, on a log scale.

    The scale shows levels up to ten times the larger of the median of all values and the largest
    value of the curve. A higher level is only named.
    """
    lower = sorted([*curve, *levels.values()])
    top = 10 * max([lower[len(lower) // 2], *curve]) if lower else 1.0
    labels = [(float(curve[-1]), f"learned {short_number(curve[-1])}", INK)] if curve.size else []
    shown = {method: value for method, value in levels.items() if value <= top}
    log_scale(axes.yaxis, [*curve, *shown.values()])
    for method, value in levels.items():
        name, color = f"{method_label(method)} {short_number(value)}", method_color(method)
        if method in shown:
            line = "--" if method == "dense" else "-"
            axes.axhline(value, color=color, linewidth=1.3, linestyle=line, zorder=2)
        else:
            name += ", above ↑"
        labels.append((value, name, color))
    label_right(axes, labels)


def methods_picture(results: dict[str, Any]) -> Figure:
    """Perplexity by method, a panel for each domain.

    The bars start at the dense value, so their length is the cost of pruning.
    """
    domains, methods = domains_of(results), methods_in_order(results)
    figure, axes_list = panels(
        len(domains), "perplexity", width=5.2, height=0.8 + 0.42 * len(methods), sharey=True
    )
    rows = np.arange(len(methods))
    for axes, domain in zip(axes_list, domains, strict=True):
        values = numbers(results["perplexity"][method].get(domain) for method in methods)
        finite = values[np.isfinite(values)]
        # The scale: a log scale when the methods differ much.
        dense = number(results["perplexity"].get("dense", {}).get(domain))
        if finite.size and finite.max() > 8 * finite.min():
            log_scale(axes.xaxis, finite, room=0.22)
            start = dense if math.isfinite(dense) else axes.get_xlim()[0]
        else:
            start = dense if math.isfinite(dense) else 0.0
            axes.set_xlim(min([start, *finite]) * 0.95, max([start, *finite]) * 1.15)
        # The bars, and a line at the dense value.
        axes.barh(
            rows,
            np.nan_to_num(values - start),
            left=start,
            height=0.62,
            color=[method_color(method) for method in methods],
        )
        if math.isfinite(dense):
            axes.axvline(dense, color="#000000", linewidth=1.2)
        # The value beside each bar.
        for row, value in zip(rows, values, strict=True):
            text = short_number(value) if math.isfinite(value) else "not known"
            place = max(value, start) if math.isfinite(value) else start
            axes.annotate(
                text,
                (place, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color="#222222",
            )
        axes.set_title(domain, loc="left")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", left=False)
    axes_list[0].set_yticks(rows, [method_label(method) for method in methods])
    axes_list[0].invert_yaxis()
    return figure
