"""The pictures that compare runs: perplexity against consumed samples, learning curves, and the
differences of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from megamask.config.paths import LEARNED
from megamask.masks.compare import differences
from megamask.masks.file import MaskSet
from megamask.report.difference_tables import layer_map
from megamask.report.layers import places_of
from megamask.report.mask_matrix import differing_shares, matrix_picture
from megamask.report.plot_style import (
    FloatArray,
    label_right,
    label_right_linear,
    log_scale,
    numbers,
    panels,
    short_number,
    tokens_seen,
)
from megamask.report.result_table import ResultTable, TablePicture
from megamask.report.results_table import method_label
from megamask.report.run_facts import RunFacts
from megamask.report.samples_pictures import calibration_samples
from megamask.report.step_pictures import LOSS_TITLE, MASK_TITLES, running_median
from megamask.weights.model_identity import MODEL

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b58900", "#332288", "#7f7f7f")
STYLES = ("-", "--", ":", "-.")
CURVES = {
    "lm_loss": LOSS_TITLE,
    **{key: MASK_TITLES[key] for key in ("max_prob", "flip_rate")},
}


@dataclass(frozen=True)
class Curve:
    """Held-out perplexity of a run while it learned.

    Attributes:
        run: name of the run.
        look: colour and line style.
        samples: consumed samples, those of the prior's calibration included.
        values: perplexities.
    """

    run: str
    look: tuple[str, str]
    samples: FloatArray
    values: FloatArray


def samples_section(runs: Sequence[RunFacts]) -> ResultTable | None:
    """Perplexity against consumed samples, all runs in one picture; None where no run has it."""
    curves = curves_of(runs)
    if not curves:
        return None
    caption = (
        "Held-out perplexity of the hard mask while learning, which begins with the calibration "
        "samples of its prior. A panel has runs of one model, one held-out text, one protocol and "
        "one length of a sample; runs whose text is not known have panels of their own."
    )
    picture = TablePicture(
        "samples", "Consumed samples against perplexity", caption, partial(samples_figure, curves)
    )
    return ResultTable("Consumed samples against perplexity", [], [], pictures=[picture])


def curves_of(runs: Sequence[RunFacts]) -> dict[str, list[Curve]]:
    """Title of a panel -> its curves."""
    found: dict[tuple[object, ...], list[Curve]] = {}
    titles: dict[tuple[object, ...], str] = {}
    for number, run in enumerate(runs):
        length = run.settings.data.seq_length if run.settings else None
        domains = dict.fromkeys(name for one in run.data.evaluations for name in one["perplexity"])
        for domain in domains:
            key = (domain, *_condition(run, domain))
            titles.setdefault(key, f"{domain}: {run.model_name}, samples of {length or '?'} tokens")
            tokens = tokens_seen(run.data.evaluations)
            before = calibration_samples(run.data.prior)
            samples = tokens / length + before if length else tokens
            values = numbers(one["perplexity"].get(domain) for one in run.data.evaluations)
            is_known = np.isfinite(values)
            curve = Curve(run.name, look_of(number), samples[is_known], values[is_known])
            found.setdefault(key, []).append(curve)
    panels_of: dict[str, list[Curve]] = {}
    for number, (key, curves) in enumerate(found.items(), start=1):
        is_alone = sum(title == titles[key] for title in titles.values()) == 1
        title = titles[key] if is_alone else f"{titles[key]} ({number})"
        panels_of[title] = curves
    return panels_of


def _condition(run: RunFacts, domain: str) -> tuple[object, ...]:
    """The facts that held-out perplexities must share to stand in one panel."""
    settings, text = run.settings, run.text.get(domain)
    if settings is None or text is None or run.model is None:
        return (run.name,)
    evaluate, windows = settings.evaluate, settings.learn.monitor.evaluate_windows
    protocol = (evaluate.window, evaluate.bos, windows, settings.dtype, settings.data.seq_length)
    return (run.model, run.data.own.model.get(MODEL), text, *protocol)


def look_of(number: int) -> tuple[str, str]:
    """Colour and line style of a run."""
    return COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]


def samples_figure(curves: dict[str, list[Curve]]) -> Figure:
    """The picture of ``curves_of``, on logarithmic axes."""
    figure, axes_list = panels(len(curves), "samples", width=5.6, height=3.8)
    for axes, (title, inside) in zip(axes_list, curves.items(), strict=True):
        labels = []
        for one in inside:
            color, style = one.look
            places = np.maximum(one.samples, 1)
            axes.plot(places, one.values, color=color, linestyle=style, marker="o", markersize=4)
            if len(one.values):
                name = f"{one.run} {short_number(float(one.values[-1]))}"
                labels.append((float(one.values[-1]), name, color))
        log_scale(axes.xaxis, [float(max(x, 1)) for one in inside for x in one.samples])
        log_scale(axes.yaxis, [float(y) for one in inside for y in one.values])
        axes.set_title(title, loc="left")
        label_right(axes, labels)
    return figure


def learning_sections(runs: Sequence[RunFacts]) -> list[ResultTable]:
    """Learning curves, a picture for each model."""
    looks = {run.name: look_of(number) for number, run in enumerate(runs)}
    models: dict[str, list[RunFacts]] = {}
    for run in runs:
        if run.data.train:
            models.setdefault(run.model or run.name, []).append(run)
    found = []
    for number, inside in enumerate(models.values(), start=1):
        beside = f" ({number} of {len(models)})" if len(models) > 1 else ""
        title = f"Learning, {inside[0].model_name}{beside}"
        caption = "Running medians, with sampled masks. Losses of unlike texts do not compare."
        draw = partial(learning_figure, inside, looks)
        picture = TablePicture(f"learning-{number}", title, caption, draw)
        found.append(ResultTable(title, [], [], pictures=[picture]))
    return found


def learning_figure(runs: Sequence[RunFacts], looks: dict[str, tuple[str, str]]) -> Figure:
    """Loss, max-prob and flip rate against tokens seen, a line for each run."""
    figure, axes_list = panels(len(CURVES), "tokens seen", width=5.2)
    for axes, (key, title) in zip(axes_list, CURVES.items(), strict=True):
        labels = []
        for run in runs:
            values = running_median(numbers(record.get(key) for record in run.data.train))
            color, style = looks[run.name]
            is_point = "o" if len(values) == 1 else ""
            tokens = tokens_seen(run.data.train)
            axes.plot(tokens, values, color=color, linestyle=style, marker=is_point)
            known = values[np.isfinite(values)]
            if known.size:
                labels.append((float(known[-1]), run.name, color))
        axes.set_title(title, loc="left")
        label_right_linear(axes, labels)
    return figure


def difference_sections(runs: Sequence[RunFacts]) -> list[ResultTable]:
    """How much the masks of runs of one model differ: a matrix for each model, and a map by layer
    where there are two masks. A run without a learned mask takes part with all its masks.
    """
    models: dict[str, dict[str, MaskSet]] = {}
    names: dict[str, str] = {}
    for run in runs:
        chosen = [LEARNED] if LEARNED in run.masks else list(run.masks)
        for method in chosen:
            one = run.masks[method]
            if one.lacks_weights or not len(one):
                continue
            names.setdefault(one.fingerprint, run.model_name)
            label = run.name if method == LEARNED else f"{run.name}: {method_label(method)}"
            models.setdefault(one.fingerprint, {})[label] = one
    several = {model: masks for model, masks in models.items() if len(masks) > 1}
    found = []
    for number, (model, masks) in enumerate(several.items(), start=1):
        beside = f" ({number} of {len(several)})" if len(several) > 1 else ""
        title = f"Differences of masks, {names[model]}{beside}"
        found.append(_differences(title, f"differences-{number}", masks))
    return found


def _differences(title: str, name: str, masks: dict[str, MaskSet]) -> ResultTable:
    labels, sets = list(masks), list(masks.values())
    shares = differing_shares(sets)
    rows = [
        (label, [label, *("–" if share != share else f"{share:.2%}" for share in row)])
        for label, row in zip(labels, shares, strict=True)
    ]
    note = (
        "Share of groups in which two masks keep other weights, over the linears that both have. "
        "Masks of unlike patterns are not compared."
    )
    pictures = [
        TablePicture(
            name,
            "Difference of any two masks",
            "Grey pairs are not compared.",
            partial(matrix_picture, labels, shares),
        )
    ]
    if len(sets) == 2 and places_of(name for name in sets[0] if name in sets[1]):
        a, b = sets
        draw = partial(layer_map, a, b, differences(a, b), (labels[0], labels[1]))
        caption = "Linear kinds x layers. megamask diff A B gives the table of such a picture."
        pictures.append(TablePicture(f"{name}-layers", "Difference by layer", caption, draw))
    return ResultTable(title, ["mask", *labels], rows, [note], pictures)
