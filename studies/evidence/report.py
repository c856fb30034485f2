"""The report of the study: ``evidence.md`` with its tables, ``evidence.json`` with what they are
made of, and a picture. What a person found stands in ``evidence-findings.md`` beside them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from megamask.errors import ArtifactError
from megamask.report.plot_style import INK, METHOD_COLORS, OTHER_COLOR, save
from megamask.report.reading import Record
from megamask.report.results_table import format_protocol, method_label
from megamask.report.sensitivity_table import sensitivity_table
from megamask.storage import read_json, write_json, write_text
from megamask.tables import table
from studies.child import AGAIN
from studies.evidence.chapters import ALL_METHODS, CHAPTERS, MATRIX, SENSITIVITY, Line, all_jobs
from studies.evidence.job import Job
from studies.evidence.runs import Study
from studies.given import between, machine, model_line

NAME = "evidence"
HIDDEN = ("parallel.", "device=")  # settings of the machine
DRAWN = ("budgets", "patterns", "reorder")  # the chapters in the picture


class Known:
    """The results of all jobs that fit the study: those of its folder, and those that an earlier
    report of ``folder`` holds.
    """

    def __init__(self, study: Study, folder: Path, seeds: Sequence[int]) -> None:
        path = folder / f"{NAME}.json"
        before: list[Record] = read_json(path, f"Delete it. {AGAIN}") if path.exists() else []
        digests = {job.name: study.digest(job) for job in all_jobs()}
        kept = [one for one in before if digests.get(one["job"]) == one["digest"]]
        now = [
            result
            for job in all_jobs()
            for seed in (seeds if job.is_seeded else seeds[:1])
            if (result := study.result(job, seed))
        ]
        by_run = {(one["job"], one["seed"]): one for one in [*kept, *now]}
        order = {name: number for number, name in enumerate(digests)}
        self.results = sorted(
            by_run.values(), key=lambda one: (order[one["job"]], one["seed"] or 0)
        )

    def of(self, job: Job) -> list[Record]:
        """The results of a job, one for each seed."""
        return [one for one in self.results if one["job"] == job.name]

    def perplexity(self, line: Line) -> list[Mapping[str, float]]:
        """Domain -> perplexity of a row, for each seed; [] where it was not measured."""
        found = (one["perplexity"].get(line.row) for one in self.of(line.job))
        return [row for row in found if row]


def write_report(study: Study, folder: Path, seeds: Sequence[int]) -> Path:
    """Write the report; return the path of the tables.

    Raises:
        ArtifactError: there are no results yet.
    """
    known = Known(study, folder, seeds)
    if not known.results:
        raise ArtifactError(study.out, "holds no results", AGAIN)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{NAME}.json", known.results)
    save(lambda: draw(known), folder / f"{NAME}.png")
    findings = folder / f"{NAME}-findings.md"
    parts = [header(known, model_line(study.base), command_line(study, seeds))]
    parts += [findings.read_text().strip()] if findings.exists() else []
    parts += [f"![Distance from the dense model]({NAME}.png)", oneshots(known)]
    for chapter in CHAPTERS:
        lines = [line for line in chapter.lines if known.perplexity(line)]
        missing = [line.label for line in chapter.lines if line not in lines]
        text = [f"## {chapter.title}", chapter.text]
        text += [chapter_table(known, lines)] if lines else []
        text += [f"Not run: {'; '.join(missing)}."] if missing else []
        parts.append("\n\n".join(text))
    parts += [
        f"## Sensitivity of the layers\n\n{sensitivity_table(one['sensitivity'])}"
        for one in known.of(SENSITIVITY)
    ]
    path = folder / f"{NAME}.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def header(known: Known, model: str, command: str) -> str:
    """Title, protocol, model, machines and command."""
    days = [one["date"] for one in known.results]
    machines = dict.fromkeys(machine(one["versions"]) for one in known.results)
    protocol = next((one["protocol"] for one in known.results if "protocol" in one), None)
    text = f"Perplexity on held-out text: {format_protocol(protocol)}. " if protocol else ""
    return "\n\n".join(
        [
            "# Evidence",
            f"{text}Mean: geometric, over domains and seeds. Where there are several seeds, cells "
            "are means with the lowest and highest in brackets.",
            f"{model}; {between(days)}; {'; or '.join(machines)}.",
            f"```\n{command}\n```",
        ]
    )


def command_line(study: Study, seeds: Sequence[int]) -> str:
    """The command of a report, without the settings of the machine."""
    words = ["python -m studies.evidence --base runs/quickstart --out runs/evidence"]
    if study.recipe.name != "quickstart.yaml":
        words.append(f"--recipe {study.recipe.name}")
    words.append("--seeds " + " ".join(map(str, seeds)))
    return " ".join([*words, *(word for word in study.settings if not word.startswith(HIDDEN))])


def chapter_table(known: Known, lines: Sequence[Line]) -> str:
    """The rows of a chapter that were measured."""
    domains = list(known.perplexity(lines[0])[0])
    cells = [
        [
            line.label,
            *(spread([one[domain] for one in rows]) for domain in domains),
            spread([mean(one) for one in rows]),
            f"{factor(known, line):.2f}" if factor(known, line) else "",
            str(len(rows)),
        ]
        for line in lines
        for rows in [known.perplexity(line)]
    ]
    return "\n".join(table(["", *domains, "mean", "x dense", "runs"], cells))


def oneshots(known: Known) -> str:
    """One-shot methods by pattern; a cell has the domains of the evaluation."""
    columns = {
        f"{pattern}{way}": (job, way)
        for way, jobs in MATRIX.items()
        for pattern, job in jobs.items()
        if known.of(job)
    }
    if not columns:
        return ""
    cells = []
    for method in ("dense", *ALL_METHODS):
        values = [
            known.perplexity(Line(method, job, method if method == "dense" else f"{method}{way}"))
            for job, way in columns.values()
        ]
        texts = [" / ".join(number(x) for x in rows[0].values()) if rows else "" for rows in values]
        cells.append([method_label(method), *texts])
    first = known.of(next(iter(columns.values()))[0])[0]
    domains = " / ".join(first["perplexity"]["dense"])
    return "\n\n".join(
        [
            "## One-shot masks",
            f"Perplexity of {domains}. Methods with a weight update have other weights. Polished: "
            "20 sweeps of exchanges.",
            "\n".join(table(["", *columns], cells)),
        ]
    )


def mean(by_domain: Mapping[str, float]) -> float:
    """The geometric mean over domains."""
    return statistics.geometric_mean(by_domain.values())


def factor(known: Known, line: Line) -> float | None:
    """Mean perplexity over that of the dense model of the same job."""
    dense = known.perplexity(Line("dense", line.job, "dense"))
    rows = known.perplexity(line)
    if not dense or not rows:
        return None
    return statistics.geometric_mean(map(mean, rows)) / mean(dense[0])


def spread(values: Sequence[float]) -> str:
    """The mean, with the lowest and highest of several values."""
    middle = number(statistics.geometric_mean(values))
    lowest, highest = number(min(values)), number(max(values))
    return middle if lowest == highest else f"{middle} ({lowest}–{highest})"


def number(value: float) -> str:
    """A perplexity."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"


def draw(known: Known) -> Figure:
    """A bar for each row: its perplexity over that of the dense model."""
    chapters = [
        (chapter.title, [(line, factor(known, line)) for line in chapter.lines])
        for chapter in CHAPTERS
        if chapter.name in DRAWN
    ]
    shown = [
        (title, [(line, value) for line, value in rows if value and line.row != "dense"])
        for title, rows in chapters
    ]
    shown = [(title, rows) for title, rows in shown if rows]
    figure = Figure(figsize=(8, 0.6 + sum(0.5 + 0.27 * len(rows) for _, rows in shown)))
    if not shown:
        return figure
    axes = figure.subplots(
        len(shown), 1, squeeze=False, height_ratios=[1 + len(rows) for _, rows in shown]
    )
    for axis, (title, rows) in zip(axes[:, 0], shown, strict=True):
        labels = [line.label for line, _ in rows]
        colors = [
            INK if line.row == "learned" else METHOD_COLORS.get(line.row, OTHER_COLOR)
            for line, _ in rows
        ]
        axis.barh(labels, [value - 1 for _, value in rows], left=1, color=colors)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.axvline(1, color=METHOD_COLORS["dense"], linewidth=1)
        for place, (_, value) in enumerate(rows):
            axis.text(max(value, 1), place, f" {value:.2f}", va="center", fontsize=8)
        axis.set_title(title)
        axis.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel("perplexity / dense perplexity (geometric mean of the domains)")
    figure.tight_layout()
    return figure
