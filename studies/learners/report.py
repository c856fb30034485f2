"""The report of the study: tables, a picture, and the findings that a person wrote in
``learners-findings.md``.
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
from megamask.storage import write_text
from megamask.tables import table
from studies.given import between, machine, model_line
from studies.learners.arm import Arm
from studies.learners.arms import ARMS, BASE, GROUPS, ONESHOT, by_name
from studies.learners.bench import CURVE_WINDOWS, Bench
from studies.learners.picture import Curve, draw
from studies.learners.runs import UPDATES, measured_times

ByDomain = dict[str, float]
NAME = "learners"
# Settings of the machine, which the printed command leaves out.
HIDDEN = ("model.hf=", "data.", "parallel.")


@dataclass(frozen=True)
class Row:
    """A row of a table: an arm with all its seeds, or a one-shot method.

    Attributes:
        name: name of the arm.
        label: first cell.
        perplexity: domain -> perplexity, for each seed.
        facts: the results of the seeds; empty for one-shot methods.
        times: the facts that ``--time`` measured.
        paper: the perplexity of the paper for this setting, or None.
    """

    name: str
    label: str
    perplexity: list[ByDomain]
    facts: list[Record]
    times: Record
    paper: float | None = None

    @property
    def scores(self) -> list[float]:
        """The geometric mean of perplexity over domains, for each seed."""
        return [
            math.exp(statistics.fmean(map(math.log, by_domain.values())))
            for by_domain in self.perplexity
        ]

    @property
    def score(self) -> float:
        """The geometric mean of perplexity over domains and seeds."""
        return statistics.geometric_mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Ratio of the largest to the smallest score of the seeds, minus 1; None for one seed."""
        return max(self.scores) / min(self.scores) - 1 if len(self.scores) > 1 else None

    def mean(self, key: str) -> float | None:
        """Mean of a fact over the seeds that have it; None where no seed has it."""
        values = [fact[key] for fact in self.facts if fact.get(key) is not None]
        return statistics.fmean(values) if values else None

    @property
    def seconds_per_step(self) -> tuple[float | None, bool]:
        """Seconds of a step, and whether the machine had other work at that time."""
        if self.times:
            return self.times["seconds_per_step"], bool(self.times["contended"])
        known = [fact["seconds_per_step"] for fact in self.facts if fact.get("seconds_per_step")]
        if not known:
            return None, False
        return min(known), any(fact["contended"] for fact in self.facts)


def write_report(bench: Bench, folder: Path) -> Path:
    """Write ``learners.md`` and ``learners.png`` of every result that fits the budget and settings.

    Returns:
        The path of the report.
    """
    rows = {name: rows_of(bench, arm) for name, arm in by_name().items()}
    known = [row for of_arm in rows.values() for row in of_arm]
    path, picture = folder / f"{NAME}.md", folder / f"{NAME}.png"
    findings = folder / f"{NAME}-findings.md"
    parts = [header(bench, known), findings.read_text().strip() if findings.exists() else ""]
    curves = [
        Curve.of(by_name()[row.name], row.facts, row.seconds_per_step)
        for row in known
        if row.facts and row.name in comparison_arms()
    ]
    if curves:
        save(lambda: draw(curves, levels(rows)), picture)
        parts.append(f"![Quality against tokens and against time, and memory]({picture.name})")
    compared = [key for key in GROUPS if key.startswith("comparison")]
    ablated = [key for key in GROUPS if key not in compared]
    parts += ["## Comparison", *(section(key, rows) for key in compared)]
    parts += ["## Ablations", *(section(key, rows) for key in ablated)]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def comparison_arms() -> list[str]:
    """Names of the arms of the comparison."""
    return [arm.name for arm in ARMS if arm.group.startswith("comparison")]


def rows_of(bench: Bench, arm: Arm) -> list[Row]:
    """The rows of an arm: one row, a row for each one-shot method, or none without results."""
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
    """The title, the facts of the study and the command."""
    facts = [fact for row in rows for fact in row.facts]
    budget = bench.budget
    command = ["python -m studies.learners --base runs/quickstart --out runs/learners"]
    command += [f"--steps {budget.steps} --micro-batch {budget.micro_batch}"]
    lines = ["# Learners compared", ""]
    if facts:
        # Budget and machine.
        last = max(facts, key=lambda fact: fact["date"])
        seq = bench.config(by_name()[BASE]).data.seq_length
        tokens = budget.global_batch * seq
        command.append(f"--tokens-per-step {tokens}")
        days = [fact["date"][:10] for fact in facts]
        machines = dict.fromkeys(
            f"{machine(fact['versions'])}, {fact['memory_gib']} GiB" for fact in facts
        )
        lines += [
            f"{model_line(bench.base)}; {budget.steps:,} steps of {budget.global_batch} x {seq} "
            f"tokens ({budget.steps * tokens:,} tokens), micro-batch {budget.micro_batch}. "
            f"{between(days)}; {'; or '.join(machines)}.",
            "",
            f"Perplexity on held-out text: {format_protocol(last['evaluation'])}. "
            "Mean: geometric, over domains. Where there are several seeds, cells are means with "
            "the lowest and highest in brackets. A difference to the reference is between the "
            "seeds that both have; what is smaller than what seeds alone make (the larger of the "
            "two arms' own, or the base's) is called a tie. Times marked * were taken while the "
            "machine had other work. The curves of the "
            f"picture are of {CURVE_WINDOWS} windows a domain, the tables of all tokens.",
            "",
        ]
    settings = [shlex.quote(word) for word in bench.extra if not word.startswith(HIDDEN)]
    return "\n".join([*lines, "```", " ".join([*command, *settings]), "```"])


def section(key: str, rows: dict[str, list[Row]]) -> str:
    """The section of a group: heading, text, table, and the arms without results."""
    group, arms = GROUPS[key], [arm for arm in ARMS if arm.group == key]
    known = [row for arm in arms for row in rows[arm.name]]
    missing = [f"`{arm.name}`" for arm in arms if not rows[arm.name]]
    parts = [f"### {group.title}", group.text]
    if known:
        reference = next(iter(rows[group.reference]), None)
        noise = next((row.spread for row in rows[BASE] if row.spread is not None), None)
        parts.append(group_table(known, reference, noise, key.startswith("comparison")))
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    return "\n\n".join(parts)


def group_table(
    rows: list[Row], reference: Row | None, noise: float | None, is_comparison: bool
) -> str:
    """A Markdown table; a column without any value is left out."""
    domains = list(rows[0].perplexity[0])
    last = ["max-prob", "gradient norm", *UPDATES.values(), "the paper's"]
    if is_comparison:
        last = ["tokens", "s a step", "peak GiB"]
    columns = ["method" if is_comparison else "setting", *domains]
    columns += ["mean", "against the reference", "groups changed", *last, "seeds"]
    lines = [
        [
            *cells(row, domains, reference, noise),
            *(costs(row) if is_comparison else state(row)),
            str(len(row.facts) or ""),
        ]
        for row in rows
    ]
    filled = [number for number in range(len(columns)) if any(line[number] for line in lines)]
    picked = [[line[number] for number in filled] for line in [columns, *lines]]
    return "\n".join(table(picked[0], picked[1:]))


def cells(row: Row, domains: list[str], reference: Row | None, noise: float | None) -> list[str]:
    """The cells that all tables have: label, perplexities, difference, share of changed groups."""
    changed = row.mean("changed")
    values = [_range([by_domain[domain] for by_domain in row.perplexity]) for domain in domains]
    return [
        row.label,
        *values,
        _range(row.scores),
        against(row, reference, noise),
        "" if changed is None else f"{changed:.2%}",
    ]


def against(row: Row, reference: Row | None, noise: float | None) -> str:
    """``reference``, a difference as ``+3.1%``, or a tie when seeds alone differ as much. The
    difference is between the seeds that both have, because a seed is the same samples in both.
    """
    if reference is None or not row.facts:
        return ""
    if row.facts[0]["digest"] == reference.facts[0]["digest"]:
        return "reference"
    ours, theirs = (
        dict(zip((fact["seed"] for fact in one.facts), one.scores, strict=True))
        for one in (row, reference)
    )
    shared = [seed for seed in ours if seed in theirs]
    logs = [math.log(ours[seed] / theirs[seed]) for seed in shared]
    if not logs:
        return ""
    difference = math.expm1(statistics.fmean(logs))
    spreads = [spread for spread in (row.spread, reference.spread) if spread is not None]
    if not spreads and noise is not None:
        spreads = [noise]
    if spreads and abs(difference) <= max(spreads):
        return f"tie ({difference:+.1%})"
    return f"{difference:+.1%}"


def costs(row: Row) -> list[str]:
    """The last cells of a comparison: tokens, seconds of a step, peak memory."""
    tokens, memory = row.mean("tokens"), row.mean("peak_memory_gib")
    seconds, contended = row.seconds_per_step
    return [
        "" if tokens is None else f"{tokens:,.0f}",
        "" if seconds is None else f"{seconds:.2f}{'*' if contended else ''}",
        "" if memory is None else f"{memory:.1f}",
    ]


def state(row: Row) -> list[str]:
    """The last cells of an ablation: max-prob, mean gradient norm, means of what the updates were
    made of, perplexity of the paper.
    """
    values = [row.mean(key) for key in ("max_prob", "grad_norm", *UPDATES)]
    return ["" if value is None else f"{value:.3g}" for value in values] + [
        "" if row.paper is None else f"{row.paper:.6g}"
    ]


def levels(rows: dict[str, list[Row]]) -> dict[str, float]:
    """Label -> score of the dense model and of the one-shot masks of 2:4, for the picture."""
    return {row.label: row.score for row in rows["oneshot-2of4"]}


def _range(values: Sequence[float]) -> str:
    mean = statistics.geometric_mean(values)
    if len(values) == 1:
        return _number(mean)
    return f"{_number(mean)} ({_number(min(values))}–{_number(max(values))})"


def _number(value: float) -> str:
    if value < 1000:
        return f"{value:,.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"
