"""The relative L1 norm of the weights that a mask keeps, by layer (MaskLLM, Figure 6).

Shapes: O, I of a linear; L layers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megamask.config import Config
from megamask.errors import MegamaskError
from megamask.masks.file import MaskSet
from megamask.report.layers import places_of
from megamask.report.plot_style import label_right_linear, method_color, panels
from megamask.report.results_table import method_label
from megamask.weights.base_model import BaseModel, base_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptNorms:
    """Relative L1 norms.

    Attributes:
        by_method: method -> share of each layer, L of them: the sum of |w| over the weights that
            the mask keeps, divided by the largest such sum of its pattern, which the magnitude mask
            has. It is nan for a layer without a mask.
    """

    by_method: dict[str, list[float]]


def read_kept_norms(config: Config, masks: Mapping[str, MaskSet]) -> KeptNorms | None:
    """The norms of all masks of the configured base model, whose weights are read once, a linear at
    a time. Masks of another model or with updated weights of their own are left out.

    Returns:
        None where the model is not there or cannot be read, and where no mask is left.
    """
    base = base_model(config)
    if not (base.hf_dir / "config.json").exists():
        return None
    try:
        return _read(base, masks)
    except MegamaskError as error:
        log.warning("no norms of kept weights: %s", error)
        return None


@torch.no_grad()
def _read(base: BaseModel, masks: Mapping[str, MaskSet]) -> KeptNorms | None:
    exact = base.fingerprints().exact
    own = {
        method: one
        for method, one in masks.items()
        if one.fingerprint == exact and not one.has_own_weights
    }
    places = places_of(dict.fromkeys(name for one in own.values() for name in one))
    layers = max((layer for _, layer in places.values()), default=-1) + 1
    if not layers:
        return None
    kept = {method: np.zeros(layers) for method in own}
    largest = {method: np.zeros(layers) for method in own}
    with base.open() as source:
        for name, (_, layer) in places.items():
            size_OI = source.tensor(f"{name}.weight").float().abs()
            best = {
                pattern: float(size_OI[pattern.best(size_OI)].sum(dtype=torch.float64))
                for pattern in {one.patterns[name] for one in own.values() if name in one}
            }
            for method, one in own.items():
                if name in one:
                    kept[method][layer] += float(size_OI[one[name]].sum(dtype=torch.float64))
                    largest[method][layer] += best[one.patterns[name]]
    return KeptNorms(
        {
            method: [
                float(part / whole) if whole else math.nan
                for part, whole in zip(kept[method], largest[method], strict=True)
            ]
            for method in own
        }
    )


def norms_picture(norms: KeptNorms) -> Figure:
    """A line for each mask over the layers."""
    figure, (axes,) = panels(1, "layer", width=8.2, height=3.6)
    labels = []
    for method, values in norms.by_method.items():
        array = np.array(values)
        color = method_color(method)
        axes.plot(range(len(array)), array, color=color, marker="o", markersize=3, linewidth=1.6)
        known = array[np.isfinite(array)]
        if known.size:
            labels.append((float(known[-1]), f"{method_label(method)} {known.mean():.1%}", color))
    axes.set_title("L1 norm of the kept weights, of the largest possible", loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    label_right_linear(axes, labels)
    return figure
