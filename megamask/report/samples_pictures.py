"""Consumed samples against perplexity (MaskLLM, Figure 4): what learning reaches with how much
text, beside the one-shot masks at their calibration samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megamask.masks.file import MaskSet
from megamask.masks.identity import recovery_of
from megamask.report.plot_style import (
    INK,
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
from megamask.report.results_table import method_label
from megamask.storage import is_number


@dataclass(frozen=True)
class Samples:
    """Samples by method.

    Attributes:
        calibration: one-shot method -> its calibration samples, at least 1.
        before: calibration samples of the prior, which learning has consumed before its first step.
        length: tokens of a learning sample.
    """

    calibration: dict[str, int]
    before: int
    length: int


def read_samples(masks: Mapping[str, MaskSet], prior: MaskSet | None) -> Samples | None:
    """The samples that the headers of mask files tell; None where the learned mask has no length of
    a sample, as masks of other tools.
    """
    learned = masks.get("learned")
    length = _data(learned).get("seq_length")
    if not is_number(length, above=0):
        return None
    known = {
        method: calibration_samples(one)
        for method, one in masks.items()
        if method != "learned" and not recovery_of(one.meta)
    }
    before = calibration_samples(prior)
    return Samples({method: count for method, count in known.items() if count}, before, int(length))


def samples_picture(
    evaluations: Sequence[Record], results: dict[str, Any], samples: Samples
) -> Figure:
    """Perplexity against samples on logarithmic axes, a panel for each domain: a line for learning,
    which begins with the samples of its prior, and a point for each one-shot mask.
    """
    domains = list(dict.fromkeys(name for record in evaluations for name in record["perplexity"]))
    figure, axes_list = panels(len(domains), "samples", width=5.6, height=3.8)
    for axes, domain in zip(axes_list, domains, strict=True):
        places = np.maximum(tokens_seen(evaluations) / samples.length + samples.before, 1)
        values = numbers(record["perplexity"].get(domain) for record in evaluations)
        points = {
            method: (count, number(results.get("perplexity", {}).get(method, {}).get(domain)))
            for method, count in samples.calibration.items()
        }
        points = {method: one for method, one in points.items() if math.isfinite(one[1])}
        axes.plot(places, values, color=INK, marker="o", markersize=4, linewidth=2, zorder=3)
        known = values[np.isfinite(values)]
        labels = [(float(one), f"learned {short_number(one)}", INK) for one in known[-1:]]
        for method, (count, value) in points.items():
            axes.plot([count], [value], color=method_color(method), marker="s", linestyle="")
            name = f"{method_label(method)} {short_number(value)}"
            labels.append((value, name, method_color(method)))
        log_scale(axes.xaxis, [*places, *(count for count, _ in points.values())])
        log_scale(axes.yaxis, [*known, *(value for _, value in points.values())])
        axes.set_title(f"Held-out perplexity: {domain}", loc="left")
        label_right(axes, labels)
    return figure


def _data(masks: MaskSet | None) -> dict[str, Any]:
    data = None if masks is None else masks.meta.get("data")
    return data if isinstance(data, dict) else {}


def calibration_samples(masks: MaskSet | None) -> int:
    """The calibration samples that a mask was made from; 0 where they are not known."""
    about = _data(masks).get("calibration")
    count = about.get("samples") if isinstance(about, dict) else None
    return int(count) if is_number(count, above=0) else 0
