"""The picture of dense and 2:4 products."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from megamask.report.plot_style import INK, METHOD_COLORS, log_scale, panels
from megamask.runtime.speed_table import Row

COLORS = {"cusparselt": INK, "cutlass": METHOD_COLORS["sparsegpt"]}


def speed_picture(rows: Sequence[Row]) -> Figure:
    """A panel a shape: dense time / 2:4 time over the tokens of a forward pass, a line a kernel,
    with the quartiles of the rounds.
    """
    timed = [row for row in rows if row.speed_up]
    shapes = list(dict.fromkeys((row.shape, row.dtype) for row in timed))
    figure, all_axes = panels(len(shapes), "tokens in a forward pass", 4.6)
    for axes, (shape, dtype) in zip(all_axes, shapes, strict=True):
        here = [row for row in timed if (row.shape, row.dtype) == (shape, dtype)]
        for kernel in dict.fromkeys(row.kernel for row in here):
            line = sorted((row.tokens, *row.speed_up) for row in here if row.kernel == kernel)
            tokens, low, median, high = zip(*line, strict=True)
            color = COLORS[kernel]
            axes.fill_between(tokens, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(tokens, median, color=color, marker="o", markersize=3.5, label=kernel)
        log_scale(axes.xaxis, [row.tokens for row in here])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{shape[0]:,} x {shape[1]:,} {dtype}: dense / 2:4")
        axes.legend(frameon=False, fontsize=8)
    return figure
