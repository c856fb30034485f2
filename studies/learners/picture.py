"""The picture of the study: quality against tokens and against time, and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from megamask.report.plot_style import STYLE, label_right
from megamask.report.reading import Record
from studies.learners.arm import Arm

COLORS = {"categorical": "#d55e00", "subset": "#0072b2", "maskpro": "#009e73"}
DASHES = {"2:4": "-", "4:8": "--", "8:16": ":", "1:4": "-."}
LEVELS = {"dense": "#000000", "SparseGPT mask": "#7f7f7f", "SparseGPT + weight update": "#b0b0b0"}
WHERE = ("2:4", "4:8", "8:16")  # the patterns that have curves; they have the same density


@dataclass(frozen=True)
class Curve:
    """The curve of an arm over the evaluations that all of its seeds have.

    Attributes:
        learner, pattern: the learner and the N:M pattern of the arm.
        tokens: number of tokens seen at each evaluation.
        score: geometric mean of perplexity over domains and seeds at each evaluation.
        seconds: learning time at each evaluation; empty when it is not known.
        contended: whether the time was measured on a busy machine.
        peak_gib: peak memory.
    """

    learner: str
    pattern: str
    tokens: list[float]
    score: list[float]
    seconds: list[float]
    contended: bool
    peak_gib: float

    @classmethod
    def of(cls, arm: Arm, facts: Sequence[Record], time: tuple[float | None, bool]) -> Curve:
        """The curve from the results of an arm's seeds; ``time`` is ``Row.seconds_per_step``."""
        seeds = [{point["step"]: point for point in fact["curve"]} for fact in facts]
        steps = [step for step in seeds[0] if all(step in seed for seed in seeds)]
        perplexities = [
            [value for seed in seeds for value in seed[step]["perplexity"].values()]
            for step in steps
        ]
        score = [math.exp(statistics.fmean(map(math.log, at))) for at in perplexities]
        seconds = [] if time[0] is None else [step * time[0] for step in steps]
        peak = max(fact["peak_memory_gib"] for fact in facts)
        learner = arm.name.rpartition("-")[0].replace("-", " from ")
        return cls(
            learner,
            arm.pattern,
            [seeds[0][step]["tokens"] for step in steps],
            score,
            seconds,
            time[1],
            peak,
        )

    @property
    def name(self) -> str:
        """The name of the arm in the picture."""
        return f"{self.learner} {self.pattern}"

    @property
    def color(self) -> str:
        """The colour of the learner."""
        return COLORS.get(self.learner.split()[0], "#cc79a7")


def draw(curves: Sequence[Curve], levels: dict[str, float]) -> Figure:
    """Draw three panels; ``levels`` are the perplexities of dense and one-shot masks by name."""
    shown = [curve for curve in curves if curve.pattern in WHERE]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14.5, 4.2), dpi=100, layout="constrained")
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.1, h_pad=0.08)
        # Quality against tokens.
        by_tokens, by_time, memory = figure.subplots(1, 3, width_ratios=[1, 1, 0.75])
        lines(by_tokens, [(curve, curve.tokens) for curve in shown], levels)
        by_tokens.set_title("Held-out perplexity against tokens", loc="left")
        by_tokens.set_xlabel("tokens seen")
        by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        # Quality against time.
        marked = [
            replace(curve, pattern=f"{curve.pattern}*") if curve.contended else curve
            for curve in shown
        ]
        timed = [
            (curve, [second / 60 for second in curve.seconds]) for curve in marked if curve.seconds
        ]
        lines(by_time, timed, levels)
        busy = " (*: on a busy machine)" if any(curve.contended for curve, _ in timed) else ""
        by_time.set_title(f"The same against learning time{busy}", loc="left")
        by_time.set_xlabel("minutes")
        bars(memory, curves)
    return figure


def lines(
    axes: Axes, curves: Sequence[tuple[Curve, list[float]]], levels: dict[str, float]
) -> None:
    """Draw curves and level lines on a log scale, with their names at the right."""
    labels = []
    for curve, x in curves:
        axes.plot(
            x,
            curve.score,
            color=curve.color,
            linestyle=DASHES[curve.pattern.rstrip("*")],
            marker="o",
            markersize=3.5,
            linewidth=1.8,
            zorder=3,
        )
        labels.append((curve.score[-1], f"{curve.name} {curve.score[-1]:.1f}", curve.color))
    for name, color in LEVELS.items():
        if name in levels:
            axes.axhline(levels[name], color=color, linewidth=1.2)
            labels.append((levels[name], f"{name} {levels[name]:.1f}", color))
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    label_right(axes, labels, gap=0.06, fontsize=8.5)


def bars(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw the peak memory of every arm."""
    rows = range(len(curves))
    axes.barh(
        rows,
        [curve.peak_gib for curve in curves],
        color=[curve.color for curve in curves],
        height=0.6,
    )
    axes.set_yticks(rows, [curve.name for curve in curves])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title("Peak memory, GiB", loc="left")
    for row, curve in zip(rows, curves, strict=True):
        axes.annotate(
            f"{curve.peak_gib:.1f}",
            (curve.peak_gib, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
