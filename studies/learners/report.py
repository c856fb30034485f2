"""The report of ``studies.learners.__main__``: tables, a picture, and the findings that a person
wrote beside it (``learners-findings.md``).
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import MegamaskError
from megamask.report.plot_style import save
from megamask.report.reading import Record
from megamask.report.results_table import format_protocol, method_label
from megamask.storage import atomic_file
from studies.learners.arms import ARMS, BASE, GROUPS, ONESHOT, Arm, by_name
from studies.learners.picture import Curve, draw
from studies.learners.runs import CURVE_WINDOWS, Bench, measured_times

ByDomain = dict[str, float]
NAME = "learners"
HIDDEN = (
    "model.hf=",
    "data.",
    "parallel.",
)  # settings of the machine rather than of the comparison


@dataclass(frozen=True)
class Row:
    """An arm over its seeds, or a one-shot method.

    Attributes:
        name: of the arm.
        label: first cell.
        perplexity: of each seed, by domain.
        facts: the results of the seeds; empty for one-shot methods.
        times: what ``--time`` measured.
        paper: the paper's perplexity for this setting.
    """

    name: str
    label: str
    perplexity: list[ByDomain]
    facts: list[Record]
    times: Record
    paper: float | None = None

    @property
    def scores(self) -> list[float]:
        """Of each seed: the geometric mean of perplexity over domains."""
        return [
            math.exp(statistics.fmean(map(math.log, by_domain.values())))
            for by_domain in self.perplexity
        ]

    @property
    def score(self) -> float:
        """Geometric mean over seeds."""
        return statistics.geometric_mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Largest over smallest score of the seeds, less 1; None for one seed."""
        return max(self.scores) / min(self.scores) - 1 if len(self.scores) > 1 else None

    def mean(self, key: str) -> float | None:
        """Mean over seeds of a fact, None where it is not known."""
        values = [fact[key] for fact in self.facts if fact.get(key) is not None]
        return statistics.fmean(values) if values else None

    @property
    def seconds_per_step(self) -> tuple[float | None, bool]:
        """Seconds, and whether the machine had other work to do meanwhile."""
        if self.times:
            return self.times["seconds_per_step"], bool(self.times["contended"])
        known = [fact["seconds_per_step"] for fact in self.facts if fact.get("seconds_per_step")]
        return (
            (min(known), any(fact["contended"] for fact in self.facts)) if known else (None, False)
        )


def write_report(bench: Bench, folder: Path) -> Path:
    """Write ``learners.md`` and ``learners.png`` of every result that fits the budget and settings.

    Returns:
        The path of the report.
    """
    rows = {name: rows_of(bench, arm) for name, arm in by_name().items()}
    known = [row for found in rows.values() for row in found]
    path, picture = folder / f"{NAME}.md", folder / f"{NAME}.png"
    findings = folder / f"{NAME}-findings.md"
    parts = [header(bench, known), findings.read_text().strip() if findings.exists() else ""]
    curves = [
        Curve.of(by_name()[row.name], row.facts, row.seconds_per_step)
        for row in known
        if row.facts and row.name in comparison_arms()
    ]
    if curves:
        save(draw(curves, levels(rows)), picture)
        parts.append(f"![Quality against tokens and against time, and memory]({picture.name})")
    parts += [
        "## Comparison",
        *(section(key, rows) for key in GROUPS if key.startswith("comparison")),
    ]
    parts += [
        "## Ablations",
        *(section(key, rows) for key in GROUPS if not key.startswith("comparison")),
    ]
    with atomic_file(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def comparison_arms() -> list[str]:
    """Names of the arms of the comparison."""
    return [arm.name for arm in ARMS if arm.group.startswith("comparison")]


def rows_of(bench: Bench, arm: Arm) -> list[Row]:
    """One row, one a method for one-shot masks, none without results."""
    try:
        results = bench.results(arm)
    except MegamaskError:  # settings that this version does not have
        return []
    if not results:
        return []
    if not arm.learns:
        measured = results[0]["perplexity"]
        return [
            Row(arm.name, method_label(method), [measured[method]], [], {})
            for method in ("dense", *ONESHOT)
            if method in measured
        ]
    perplexity = [result["perplexity"]["learned"] for result in results]
    return [Row(arm.name, arm.label, perplexity, results, measured_times(bench, arm), arm.paper)]


def header(bench: Bench, rows: Sequence[Row]) -> str:
    """Title, command, budget, machine, dates, protocol."""
    facts = [fact for row in rows for fact in row.facts]
    budget = bench.budget
    command = [
        "python",
        "-m",
        "studies.learners.__main__",
        "--base",
        "runs/quickstart",
        "--out",
        "runs/learners",
        "--steps",
        str(budget.steps),
    ]
    command += ["--micro-batch", str(budget.micro_batch)]
    lines = ["# Learners compared", ""]
    if facts:
        last, seq = (
            max(facts, key=lambda fact: fact["date"]),
            facts[0]["tokens"] // facts[0]["steps"] // budget.global_batch,
        )
        command += ["--tokens-per-step", str(budget.global_batch * seq)]
        days = sorted({fact["date"][:10] for fact in facts})
        found = last["versions"]
        device = found["gpu"] if found["gpu"] != "absent" else found["cpu"]
        lines += [
            f"SmolLM2-135M, {budget.steps:,} steps of {budget.global_batch} x {seq} tokens ({last['tokens']:,} tokens), "
            f"micro-batch {budget.micro_batch}. {' to '.join(dict.fromkeys([days[0], days[-1]]))}; {device}, {last['memory_gib']} GiB; "
            f"torch {found['torch']}, megatron-core {found['megatron-core']}.",
            "",
            f"Perplexity on held-out text: {format_protocol(last['evaluation'])}. Mean: geometric, over domains. Where there are several "
            "seeds, cells are means with the lowest and highest in brackets. A difference to the reference that is smaller than what seeds "
            "alone make (the larger of the two arms' own, or the base's) is called a tie. Times marked * were taken while the machine had "
            f"other work. The curves of the picture are of {CURVE_WINDOWS} windows a domain, the tables of all tokens.",
            "",
        ]
    settings = [shlex.quote(word) for word in bench.extra if not word.startswith(HIDDEN)]
    return "\n".join([*lines, "```", " ".join([*command, *settings]), "```"])


def section(key: str, rows: dict[str, list[Row]]) -> str:
    """A group's heading, what it varies, its table and what is missing."""
    group, arms = GROUPS[key], [arm for arm in ARMS if arm.group == key]
    found = [row for arm in arms for row in rows[arm.name]]
    missing = [f"`{arm.name}`" for arm in arms if not rows[arm.name]]
    parts = [f"### {group.title}", group.text]
    if found:
        reference = next(iter(rows[group.reference]), None)
        noise = [row.spread for row in rows[BASE] if row.spread is not None]
        parts.append(
            table(found, reference, noise[0] if noise else None, key.startswith("comparison"))
        )
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    return "\n\n".join(parts)


def table(rows: list[Row], reference: Row | None, noise: float | None, is_comparison: bool) -> str:
    """A Markdown table; columns of which nothing is known are left out."""
    domains = list(rows[0].perplexity[0])
    columns = [
        "method" if is_comparison else "setting",
        *domains,
        "mean",
        "against the reference",
        "groups changed",
    ]
    columns += (
        ["tokens", "s a step", "peak GiB"]
        if is_comparison
        else ["max-prob", "gradient norm", "the paper's"]
    )
    lines = [
        [*cells(row, domains, reference, noise), *(costs(row) if is_comparison else state(row))]
        for row in rows
    ]
    lines = [[*line, str(len(row.facts) or "")] for line, row in zip(lines, rows, strict=True)]
    columns.append("seeds")
    kept = [number for number in range(len(columns)) if any(line[number] for line in lines)]
    widths = {number: max(len(line[number]) for line in [columns, *lines]) for number in kept}

    def text(line: Sequence[str]) -> str:
        return f"| {' | '.join(line[n].ljust(widths[n]) if n == 0 else line[n].rjust(widths[n]) for n in kept)} |"

    rule = [
        "-" * widths[number] if number == 0 else "-" * (widths[number] - 1) + ":" for number in kept
    ]
    return "\n".join([text(columns), f"| {' | '.join(rule)} |", *map(text, lines)])


def cells(row: Row, domains: list[str], reference: Row | None, noise: float | None) -> list[str]:
    """Label, perplexities, difference, share changed."""
    changed = row.mean("changed")
    values = [_range([one[domain] for one in row.perplexity]) for domain in domains]
    return [
        row.label,
        *values,
        _range(row.scores),
        against(row, reference, noise),
        "" if changed is None else f"{changed:.2%}",
    ]


def against(row: Row, reference: Row | None, noise: float | None) -> str:
    """``reference``, ``+3.1%``, or a tie when seeds alone make such a difference."""
    if reference is None or not row.facts:
        return ""
    if row.facts[0]["digest"] == reference.facts[0]["digest"]:
        return "reference"
    difference = row.score / reference.score - 1
    spreads = [spread for spread in (row.spread, reference.spread) if spread is not None] or [
        spread for spread in [noise] if spread is not None
    ]
    return (
        f"tie ({difference:+.1%})"
        if spreads and abs(difference) <= max(spreads)
        else f"{difference:+.1%}"
    )


def costs(row: Row) -> list[str]:
    """Tokens, seconds a step, peak memory."""
    tokens, memory = row.mean("tokens"), row.mean("peak_memory_gib")
    seconds, contended = row.seconds_per_step
    return [
        "" if tokens is None else f"{tokens:,.0f}",
        "" if seconds is None else f"{seconds:.2f}{'*' if contended else ''}",
        "" if memory is None else f"{memory:.1f}",
    ]


def state(row: Row) -> list[str]:
    """Confidence at the end, mean gradient norm, the paper's figure."""
    values = [row.mean("max_prob"), row.mean("grad_norm"), row.paper]
    return ["" if value is None else f"{value:.3g}" for value in values[:2]] + [
        "" if row.paper is None else f"{row.paper:.6g}"
    ]


def levels(rows: dict[str, list[Row]]) -> dict[str, float]:
    """Dense and the one-shot masks of 2:4, as levels of the picture."""
    return {row.label: row.score for row in rows["oneshot-2of4"]}


def _range(values: Sequence[float]) -> str:
    mean = statistics.geometric_mean(values)
    return (
        _number(mean)
        if len(values) == 1
        else f"{_number(mean)} ({_number(min(values))}–{_number(max(values))})"
    )


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"
