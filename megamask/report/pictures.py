"""The pictures of a run. Colours are Okabe and Ito's, which colour-blind readers can tell apart,
and lines carry their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from megamask.report.layers import LayerTable
from megamask.report.reading import Record
from megamask.report.results_table import domains_of, method_label, methods_in_order
from megamask.storage import atomic_file

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "figure.dpi": 144,
    "savefig.facecolor": "white",
}
METHOD_COLORS = {
    "dense": "#000000",
    "magnitude": "#7f7f7f",
    "wanda": "#cc79a7",
    "sparsegpt": "#0072b2",
    "sparsegpt_update": "#009e73",
    "learned": "#d55e00",
}
INK = METHOD_COLORS["learned"]
OTHER_COLOR = "#b58900"
PANEL = (4.1, 3.3)  # inches


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, atomically."""
    with atomic_file(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format="png")


def loss_picture(train: Sequence[Record]) -> Figure:
    """Losses, weight-norm term and gradient norm against tokens seen: every step faint, their
    running median strong.
    """
    titles = {
        "lm_loss": "LM loss (nats per token)",
        "weight_norm_term": "Weight-norm term",
        "grad_norm": "Gradient norm of the logits",
    }
    if any("kd_loss" in record for record in train):
        titles["kd_loss"] = "Distillation loss (nats per token)"
    return _metric_panels(train, titles)


def mask_picture(train: Sequence[Record]) -> Figure:
    """Max-prob, flip rate and difference from the prior mask against tokens seen."""
    titles = {
        "max_prob": "Max-prob: mean probability of the\nlikeliest candidate",
        "flip_rate": "Flip rate: groups whose winner\nchanged in the step",
        "prior_difference": "Difference from the prior:\ngroups with another winner",
    }
    figure = _metric_panels(train, titles)
    for axes, name in zip(figure.axes, titles, strict=True):
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}")
            if name == "max_prob"
            else PercentFormatter(1.0)
        )
    return figure


def perplexity_picture(evaluations: Sequence[Record], results: dict[str, Any]) -> Figure:
    """Held-out perplexity of the winner mask against tokens seen, a panel per domain; other methods
    of ``results`` as level lines.

    A level far above all that matters is named at the upper edge instead of squeezing the rest.
    """
    domains = list(
        dict.fromkeys(domain for record in evaluations for domain in record["perplexity"])
    )
    figure, panels = _panels(len(domains), "tokens seen", width=5.6, height=3.8)
    for axes, domain in zip(panels, domains, strict=True):
        values = _numbers(record["perplexity"].get(domain) for record in evaluations)
        levels = {
            method: _number(results["perplexity"][method].get(domain))
            for method in methods_in_order(results)
            if method != "learned"
        }
        axes.plot(
            _tokens(evaluations),
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


def _draw_levels(axes: Axes, curve: np.ndarray, levels: dict[str, float]) -> None:
    """Level lines and the names of all lines, on a log scale that ends where levels are ten times
    the lower ones.
    """
    lower = sorted([*curve, *levels.values()])
    top = 10 * max([lower[len(lower) // 2], *curve]) if lower else 1.0
    labels = [(float(curve[-1]), f"learned {_short(curve[-1])}", INK)] if curve.size else []
    shown = {method: value for method, value in levels.items() if value <= top}
    _log_scale(axes.yaxis, [*curve, *shown.values()])
    for method, value in levels.items():
        if value <= top:
            axes.axhline(
                value,
                color=_color(method),
                linewidth=1.3,
                linestyle="--" if method == "dense" else "-",
                zorder=2,
            )
            labels.append((value, f"{method_label(method)} {_short(value)}", _color(method)))
        else:
            labels.append(
                (value, f"{method_label(method)} {_short(value)}, above ↑", _color(method))
            )
    _label_right(axes, labels)


def methods_picture(results: dict[str, Any]) -> Figure:
    """Perplexity by method, a panel per domain. Bars start at the dense value: their length is what
    pruning costs.
    """
    domains, methods = domains_of(results), methods_in_order(results)
    figure, panels = _panels(
        len(domains), "perplexity", width=5.2, height=0.8 + 0.42 * len(methods), sharey=True
    )
    rows = np.arange(len(methods))
    for axes, domain in zip(panels, domains, strict=True):
        values = _numbers(results["perplexity"][method].get(domain) for method in methods)
        finite = values[np.isfinite(values)]
        dense = _number(results["perplexity"].get("dense", {}).get(domain))
        if finite.size and finite.max() > 8 * finite.min():
            _log_scale(axes.xaxis, finite, room=0.22)
            start = dense if math.isfinite(dense) else axes.get_xlim()[0]
        else:
            start = dense if math.isfinite(dense) else 0.0
            axes.set_xlim(min([start, *finite]) * 0.95, max([start, *finite]) * 1.15)
        axes.barh(
            rows,
            np.nan_to_num(values - start),
            left=start,
            height=0.62,
            color=[_color(method) for method in methods],
        )
        if math.isfinite(dense):
            axes.axvline(dense, color="#000000", linewidth=1.2)
        for row, value in zip(rows, values, strict=True):
            text = _short(value) if math.isfinite(value) else "not known"
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
    panels[0].set_yticks(rows, [method_label(method) for method in methods])
    panels[0].invert_yaxis()
    return figure


def layers_picture(table: LayerTable) -> Figure:
    """Density per layer, and below it the share of groups that differ from the prior mask, linear
    kinds x layers.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        compared = table.difference_KL is not None
        width = 3.2 + 0.24 * max(12, table.layers)
        figure = Figure(
            figsize=(width, 1.9 + 0.36 * len(table.kinds) if compared else 1.9),
            layout="constrained",
        )
        grid = figure.add_gridspec(
            2 if compared else 1,
            1,
            height_ratios=[1.1, 0.36 * len(table.kinds)] if compared else None,
        )
        above = figure.add_subplot(grid[0])
        above.bar(range(table.layers), table.density_L, color="#0072b2", width=0.75)
        above.set_ylim(0, 1)
        above.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        above.set_title(f"Density of the layer's linears ({_range(table.density_L)})", loc="left")
        lowest = above
        if table.difference_KL is not None:
            lowest = figure.add_subplot(grid[1], sharex=above)
            above.tick_params(labelbottom=False)
            _heat_map(
                figure,
                lowest,
                table.kinds,
                table.difference_KL,
                "Groups that differ from the prior mask",
            )
        _layer_axis(lowest, table.layers)
    return figure


def difference_picture(kinds: list[str], difference_KL: list[list[float]], title: str) -> Figure:
    """Shares that differ between two masks, linear kinds x layers; nan where there is nothing to
    compare.
    """
    layers = len(difference_KL[0])
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(
            figsize=(3.2 + 0.24 * max(12, layers), 1.2 + 0.36 * len(kinds)), layout="constrained"
        )
        axes = figure.add_subplot()
        _heat_map(figure, axes, kinds, difference_KL, title)
        _layer_axis(axes, layers)
    return figure


def _layer_axis(axes: Axes, layers: int) -> None:
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_xlabel("layer")


def _heat_map(
    figure: Figure, axes: Axes, kinds: list[str], difference_KL: list[list[float]], title: str
) -> None:
    shares = np.ma.masked_invalid(np.array(difference_KL))
    axes.set_facecolor("#dddddd")
    image = axes.imshow(shares, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title(title + (" (grey: not compared)" if shares.mask.any() else ""), loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)


def _metric_panels(train: Sequence[Record], titles: dict[str, str]) -> Figure:
    figure, panels = _panels(len(titles), "tokens seen")
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        tokens, values = _tokens(train), _numbers(record.get(name) for record in train)
        axes.plot(
            tokens,
            values,
            color="#56b4e9",
            linewidth=0.8,
            alpha=0.7,
            marker="o" if len(tokens) == 1 else "",
        )
        axes.plot(tokens, running_median(values), color="#0072b2", linewidth=2)
        axes.set_title(title, loc="left")
        if not np.isfinite(values).any():
            axes.text(
                0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="#777777"
            )
    return figure


def _panels(
    count: int, xlabel: str, width: float = PANEL[0], height: float = PANEL[1], sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        columns = min(count, 3)
        rows = math.ceil(count / columns)
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.04)  # type: ignore[union-attr, call-arg]
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
        for spare in panels[count:]:
            spare.remove()
        for axes in panels[:count]:
            axes.set_xlabel(xlabel)
            if xlabel == "tokens seen":
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, panels[:count]


def running_median(values: np.ndarray, share: float = 0.04) -> np.ndarray:
    """Median over a centred window of ``share`` of the points, at least 5, fewer at the ends; what
    is not finite is left out.
    """
    half = max(2, int(len(values) * share) // 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array(
        [
            np.median(finite) if (finite := window[np.isfinite(window)]).size else np.nan
            for window in windows
        ]
    )


def _tokens(records: Sequence[Record]) -> np.ndarray:
    return np.array([float(record["tokens"]) for record in records])


def _numbers(values: Iterable[Any]) -> np.ndarray:
    return np.array([_number(value) for value in values])


def _log_scale(axis: Any, values: Sequence[float] | np.ndarray, room: float = 0.06) -> None:
    """Log scale over ``values`` with a little room, and ticks written as plain numbers."""
    low, high = (math.log(min(values)), math.log(max(values))) if len(values) else (0.0, 1.0)
    span = max(high - low, 0.1)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.axes.set(
        **{f"{axis.axis_name}lim": (math.exp(low - 0.06 * span), math.exp(high + room * span))}
    )
    axis.set_major_locator(
        LogLocator(
            subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
            if span < 2.5
            else (1.0, 2.0, 5.0)
            if span < 3.5
            else (1.0,)
        )
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_right(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.065) -> None:
    """Names beside the right edge at their values' heights, moved apart where they would
    overlap.
    """
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ordered = sorted(labels)
    places = spread(
        [min((math.log(value) - low) / (high - low), 1.0) for value, _, _ in ordered], gap
    )
    for place, (_, text, color) in zip(places, ordered, strict=True):
        axes.text(1.02, place, text, transform=axes.transAxes, va="center", color=color, fontsize=9)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved up until they are ``gap`` apart, then down again where they left the
    top (1).
    """
    apart: list[float] = []
    for place in places:
        apart.append(max(place, apart[-1] + gap) if apart else place)
    ceiling = 1.0
    for i in reversed(range(len(apart))):
        apart[i] = min(apart[i], ceiling)
        ceiling = apart[i] - gap
    return apart


def _color(method: str) -> str:
    return METHOD_COLORS.get(method, OTHER_COLOR)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _short(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _range(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"
