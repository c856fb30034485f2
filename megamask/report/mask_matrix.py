"""How much any two of several masks differ (MaskLLM, Figure 8): shares of groups, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megamask.masks.file import MaskSet
from megamask.report.plot_style import STYLE


def differing_shares(masks: Sequence[MaskSet]) -> list[list[float]]:
    """Share of groups that hold another choice in mask i than in mask j, over the linears that both
    have with one pattern. It is nan where the base models differ, or there is no such linear. Each
    mask of a linear is decoded once.

    Raises:
        ArtifactError: a mask is corrupt.
    """
    count = len(masks)
    differ, groups = np.zeros((count, count)), np.zeros((count, count))
    for name in dict.fromkeys(linear for one in masks for linear in one):
        index = {i: one.index(name) for i, one in enumerate(masks) if name in one}
        for i in index:
            for j in index:
                if i < j and _is_comparable(masks[i], masks[j], name):
                    differ[i, j] += int((index[i] != index[j]).sum())
                    groups[i, j] += index[i].numel()
    differ, groups = differ + differ.T, groups + groups.T
    shares = np.where(groups > 0, differ / np.maximum(groups, 1), math.nan)
    np.fill_diagonal(shares, 0.0)
    return [[float(share) for share in row] for row in shares]


def _is_comparable(a: MaskSet, b: MaskSet, name: str) -> bool:
    is_of_one_model = a.fingerprint == b.fingerprint and a.shape(name) == b.shape(name)
    return is_of_one_model and a.patterns[name] == b.patterns[name]


def matrix_picture(names: Sequence[str], shares: Sequence[Sequence[float]]) -> Figure:
    """A map of the shares, with each share written into its cell; grey cells are not compared.

    Args:
        names: of the masks.
        shares: ``differing_shares`` of the masks.
    """
    size = 2.6 + 0.62 * len(names)
    values = np.ma.masked_invalid(np.array(shares))
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(size + 1.2, size), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("#dddddd")
        image = axes.imshow(values, cmap="cividis", vmin=0)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        middle = float(values.max()) / 2 if values.count() else 0.0
        for (row, column), share in np.ndenumerate(np.array(shares)):
            if math.isfinite(share):
                color = "#ffffff" if share <= middle else "#000000"
                axes.text(
                    column, row, f"{share:.1%}", ha="center", va="center", color=color, fontsize=8
                )
        axes.set_title("Groups that differ between two masks", loc="left")
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, format=PercentFormatter(1.0))
        bar.outline.set_visible(False)
    return figure
