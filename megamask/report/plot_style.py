"""The common look of the pictures: style, colours, panels, scales and labels.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from megamask.report.results_table import base_method
from megamask.storage import atomic_file

if TYPE_CHECKING:
    from megamask.report.reading import Record

FloatArray = NDArray[np.float64]

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
    "text.parse_math": False,  # a $ in the name of a domain, mask or run is a $
}
METHOD_COLORS = {
    "dense": "#000000",
    "magnitude": "#7f7f7f",
    "wanda": "#cc79a7",
    "ria": "#56b4e9",
    "gblm": "#882255",
    "pruner_zero": "#aa4499",
    "sparsegpt": "#0072b2",
    "sparsegpt_update": "#009e73",
    "admm": "#332288",
    "admm_update": "#44aa99",
    "learned": "#d55e00",
}
INK = METHOD_COLORS["learned"]
OTHER_COLOR = "#b58900"  # a method that has no colour of its own
PANEL = (4.1, 3.3)  # width and height in inches


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure in the common style, and write it as a PNG file atomically."""
    with atomic_file(path) as temporary, matplotlib.rc_context(STYLE):
        draw().savefig(temporary, format="png")


def panels(
    count: int, xlabel: str, width: float = PANEL[0], height: float = PANEL[1], sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes, at most three beside each other.

    Args:
        count: number of axes.
        xlabel: label of every x axis; "tokens seen" also sets the format of its ticks.
        width, height: size of each panel in inches.
        sharey: whether all panels have the same y axis.
    """
    with matplotlib.rc_context(STYLE):
        columns = min(count, 3)
        rows = math.ceil(count / columns)
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.12, h_pad=0.08, wspace=0.04)
        all_axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
        for spare in all_axes[count:]:
            spare.remove()
        for axes in all_axes[:count]:
            axes.set_xlabel(xlabel)
            if xlabel == "tokens seen":
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, all_axes[:count]


def log_scale(axis: Any, values: Sequence[float] | FloatArray, room: float = 0.06) -> None:
    """Set a log scale over ``values`` with plain numbers at the ticks.

    Args:
        axis: the x or y axis.
        values: the values that must be visible.
        room: free space beyond the largest value, as a share of the span.
    """
    low, high = (math.log(min(values)), math.log(max(values))) if len(values) else (0.0, 1.0)
    span = max(high - low, 0.1)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.axes.set(
        **{f"{axis.axis_name}lim": (math.exp(low - 0.06 * span), math.exp(high + room * span))}
    )
    ticks: tuple[float, ...] = (1.0,)
    if span < 2.5:
        ticks = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    elif span < 3.5:
        ticks = (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def label_right(
    axes: Axes,
    labels: Sequence[tuple[float, str, str]],
    gap: float = 0.065,
    fontsize: float = 9,
) -> None:
    """Write names beside the right edge, each at the height of its value.

    Args:
        axes: the panel.
        labels: (value, text, colour) of each name.
        gap: smallest distance between two names, as a share of the height.
        fontsize: size of the names in points.
    """
    _write_right(axes, labels, gap, fontsize, math.log)


def label_right_linear(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """``label_right`` for an axis that is not logarithmic."""
    _write_right(axes, labels, 0.065, 9, float)


def _write_right(
    axes: Axes,
    labels: Sequence[tuple[float, str, str]],
    gap: float,
    fontsize: float,
    scale: Callable[[float], float],
) -> None:
    low, high = (scale(limit) for limit in axes.get_ylim())
    ordered = sorted(labels)
    places = spread([min((scale(value) - low) / (high - low), 1.0) for value, _, _ in ordered], gap)
    for place, (_, text, color) in zip(places, ordered, strict=True):
        axes.text(
            1.02, place, text, transform=axes.transAxes, va="center", color=color, fontsize=fontsize
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart until they are at least ``gap`` apart and at most 1."""
    apart: list[float] = []
    for place in places:
        apart.append(max(place, apart[-1] + gap) if apart else place)
    ceiling = 1.0
    for i in reversed(range(len(apart))):
        apart[i] = min(apart[i], ceiling)
        ceiling = apart[i] - gap
    return apart


def method_color(method: str) -> str:
    """The colour of a method in all pictures, also of a polished one."""
    return METHOD_COLORS.get(base_method(method), OTHER_COLOR)


def tokens_seen(records: Sequence[Record]) -> FloatArray:
    """The number of tokens that learning had seen at each record."""
    return np.array([float(record["tokens"]) for record in records])


def numbers(values: Iterable[Any]) -> FloatArray:
    """The values as an array, nan for None."""
    return np.array([number(value) for value in values])


def number(value: Any) -> float:
    """The value as a float, nan for None."""
    return math.nan if value is None else float(value)


def short_number(value: float) -> str:
    """A perplexity in few characters: ``12.3``, ``1,234``."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
