"""Pictures of masks by layer: density, and the share of groups that differ.

Shapes: K linear kinds, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megamask.report.layers import LayerTable
from megamask.report.plot_style import STYLE


def layers_picture(table: LayerTable) -> Figure:
    """Density of each layer and, below it, the share of groups that differ from the prior mask.

    The share is a map of linear kinds x layers; it is left out where there was no prior mask.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        compared = table.difference_KL is not None
        width, height = 3.2 + 0.24 * max(12, table.layers), 1.9
        ratios = [1.1]
        if compared:
            height += 0.36 * len(table.kinds)
            ratios.append(0.36 * len(table.kinds))
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
        # Above: the density.
        above = figure.add_subplot(grid[0])
        above.bar(range(table.layers), table.density_L, color="#0072b2", width=0.75)
        above.set_ylim(0, 1)
        above.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        above.set_title(f"Density of the layer's linears ({_range(table.density_L)})", loc="left")
        # Below: the difference from the prior mask.
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
    """A map of the shares that differ between two masks, linear kinds x layers.

    Args:
        kinds: names of the linear kinds, K.
        difference_KL: the shares; nan where there is nothing to compare.
        title: title of the picture.
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
    """Draw a map of shares with its colour bar; grey cells hold nan."""
    shares = np.ma.masked_invalid(np.array(difference_KL))
    axes.set_facecolor("#dddddd")
    image = axes.imshow(shares, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title(title + (" (grey: not compared)" if shares.mask.any() else ""), loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)


def _range(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"
