"""Pictures of the numbers that learning records at every step: losses, and how the mask settles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megamask.report.plot_style import FloatArray, numbers, panels, tokens_seen
from megamask.report.reading import Record

LOSS_TITLE = "LM loss (nats per token)"
MASK_TITLES = {
    "max_prob": "Max-prob: mean probability of the\nlikeliest candidate",
    "flip_rate": "Flip rate: groups whose hard mask\nchanged in the step",
    "prior_difference": "Difference from the prior:\ngroups with another hard mask",
}


def loss_picture(train: Sequence[Record]) -> Figure:
    """Losses, weight-norm term and gradient norm against tokens seen.

    A faint line shows every step, a strong line the running median.
    """
    titles = {
        "lm_loss": LOSS_TITLE,
        "weight_norm_term": "Weight-norm term",
        "grad_norm": "Gradient norm of the logits",
    }
    if any("kd_loss" in record for record in train):
        titles["kd_loss"] = "Distillation loss (nats per token)"
    if any("hidden_loss" in record for record in train):
        titles["hidden_loss"] = "Distance of the layers from the dense model's"
    return _metric_panels(train, titles)


def update_picture(train: Sequence[Record]) -> Figure:
    """The share of signal in the gradient, of logits below epsilon, and the length of a move
    against tokens seen, of the steps that measured their update.
    """
    titles = {
        "signal_share": "Signal: share of the squared gradient",
        "below_epsilon": "Logits whose gradient is below epsilon",
        "relative_step": "Mean move of a logit (rates)",
        "clip_factor": "Clip factor",
    }
    return _metric_panels([record for record in train if "signal_share" in record], titles)


def mask_picture(train: Sequence[Record]) -> Figure:
    """Max-prob, flip rate and difference from the prior mask against tokens seen."""
    figure = _metric_panels(train, MASK_TITLES)
    for axes, name in zip(figure.axes, MASK_TITLES, strict=True):
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}")
            if name == "max_prob"
            else PercentFormatter(1.0)
        )
    return figure


def _metric_panels(train: Sequence[Record], titles: dict[str, str]) -> Figure:
    """A panel for each metric of ``titles`` (name -> title) against tokens seen."""
    figure, axes_list = panels(len(titles), "tokens seen")
    for axes, (name, title) in zip(axes_list, titles.items(), strict=True):
        tokens, values = tokens_seen(train), numbers(record.get(name) for record in train)
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


def running_median(values: FloatArray, share: float = 0.04) -> FloatArray:
    """Median over a centred window; values that are not finite are left out.

    The window has ``share`` of the points, but at least 5. It is shorter at both ends.
    """
    half = max(2, int(len(values) * share) // 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array(
        [
            np.median(finite) if (finite := window[np.isfinite(window)]).size else np.nan
            for window in windows
        ]
    )
