"""The tables that compare runs. Perplexities and accuracies stand in one table, and in one ranking,
only where model and protocol are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median
from typing import Any

from megamask.config.deciding import below_run
from megamask.config.nested import flatten
from megamask.config.paths import DENSE, LEARNED
from megamask.masks.codings import coding_of
from megamask.report.reading import bits
from megamask.report.result_table import ResultTable
from megamask.report.results_table import (
    METHOD_LABELS,
    base_method,
    best_one_shot,
    format_bytes,
    format_perplexity,
    format_protocol,
    method_label,
)
from megamask.report.run_facts import RunFacts, facts_of_mask
from megamask.report.tasks_table import NOTE, tasks_cells
from megamask.weights.model_identity import MODEL

NOTHING = "–"
# Facts of a protocol that change no number: how much text the KL column has, and names of places,
# beside which stand digests.
WITHOUT_EFFECT = {"compared_targets", "tokenizer", "text"}
TEXT_DIGESTS = {"text_sha256", "documents_sha256"}


@dataclass
class Group:
    """Runs whose numbers compare.

    Attributes:
        model: name of the base model.
        digests: of the base model, its fingerprint and its ``model_sha256``; None where nothing
            tells. Models of equal linears may differ in norms, embedding and config.json.
        protocol: the facts of the protocol.
        members: the runs, with their results.
    """

    model: str
    digests: tuple[str | None, str | None]
    protocol: Mapping[str, Any]
    members: list[tuple[RunFacts, Mapping[str, Any]]] = field(default_factory=list)


def groups_of(
    runs: Sequence[RunFacts], results_of: Callable[[RunFacts], Mapping[str, Any]]
) -> list[Group]:
    """The groups, in the order of their first run. A run whose results name no model, or no text,
    is a group of its own.

    Args:
        runs: all runs.
        results_of: a run -> results with ``protocol`` and ``masks``; empty where it has none.
    """
    found: dict[str, Group] = {}
    measured = [
        (run, results, _model_of(run, results)) for run in runs if (results := results_of(run))
    ]
    models: dict[str | None, set[str]] = {}  # fingerprint -> the models of those linears
    for _, _, (of_linears, of_all) in measured:
        models.setdefault(of_linears, set()).update(filter(None, [of_all]))
    for run, results, model in measured:
        protocol = results.get("protocol") or {}
        kept = {key: value for key, value in protocol.items() if key not in WITHOUT_EFFECT}
        if model[1] is None and len(models[model[0]]) == 1:  # of a version that did not say it
            model = model[0], next(iter(models[model[0]]))
        is_known = model[0] is not None and not TEXT_DIGESTS.isdisjoint(kept)
        key = json.dumps([model, kept, "" if is_known else run.name], sort_keys=True, default=str)
        group = found.setdefault(key, Group(run.model_name, model, protocol))
        group.members.append((run, results))
    return list(found.values())


def _model_of(run: RunFacts, results: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The digests of the model that was measured."""
    made = results.get("masks")
    rows = made.values() if isinstance(made, dict) else ()
    known = {str(one.get("fingerprint")) for one in rows if isinstance(one, dict)}
    of_linears = known.pop() if len(known) == 1 else None if known else run.model
    return of_linears, results.get(MODEL, run.data.own.model.get(MODEL))


def runs_table(runs: Sequence[RunFacts]) -> ResultTable:
    """What each run is, how far it came, and what it took."""
    header = ["run", "state", "model", "pattern", "method", "prior", "steps", "tokens", "seed"]
    header += ["time", "tokens/s", "memory"]
    rows = [(run.name, _run_row(run)) for run in runs]
    return ResultTable("Runs", header, rows, ["tokens/s: the median over the steps."])


def _run_row(run: RunFacts) -> list[str]:
    settings, about = run.settings, facts_of_mask(run.masks.get(LEARNED))
    last = run.data.train[-1] if run.data.train else {}
    learn = settings.learn if settings else None
    seconds = max((one["seconds"] for one in run.data.train + run.data.evaluations), default=None)
    return [
        run.name,
        run.state,
        run.model_name,
        run.pattern,
        str(about.get("method") or (learn.method if learn else NOTHING)),
        str(about.get("prior") or (learn and learn.prior.mask) or NOTHING),
        f"{last['step']:,}" if last else NOTHING,
        f"{last['tokens']:,.0f}" if last else NOTHING,
        str(settings.seed) if settings else NOTHING,
        NOTHING if seconds is None else f"{seconds:,.0f} s",
        _typical(run, "tokens_per_second", median, "{:,.0f}"),
        _typical(run, "memory_gib", max, "{:.1f} GiB"),
    ]


def _typical(run: RunFacts, key: str, of: Callable[[list[float]], float], form: str) -> str:
    values = [float(record[key]) for record in run.data.train if key in record]
    return form.format(of(values)) if values else NOTHING


def perplexity_tables(runs: Sequence[RunFacts]) -> list[ResultTable]:
    """A table for each model and protocol: dense, best one-shot mask, and mask of each run."""
    found: list[ResultTable] = []
    for name in dict.fromkeys(name for run in runs for name in run.data.by_protocol()):
        groups = groups_of(runs, partial(_results_under, name))
        found += _told_apart(groups, f"Perplexity, {name}", _perplexity_table)
    return found


def _results_under(protocol: str, run: RunFacts) -> Mapping[str, Any]:
    return run.data.by_protocol().get(protocol, {})


def _told_apart(
    groups: Sequence[Group], title: str, table_of: Callable[[Group, str], ResultTable]
) -> list[ResultTable]:
    """The tables of groups, numbered where there are several, with what sets them apart."""
    found = []
    for number, group in enumerate(groups, start=1):
        beside = f" ({number} of {len(groups)}, which do not compare)" if len(groups) > 1 else ""
        table = table_of(group, f"{title}, {group.model}{beside}")
        first = groups[0]
        other = [
            key.replace("_", " ")
            for key in dict.fromkeys([*first.protocol, *group.protocol])
            if first.protocol.get(key) != group.protocol.get(key) and key not in WITHOUT_EFFECT
        ]
        notes = list(table.notes)
        if number > 1:
            other = ["model"] * (group.digests != first.digests) + other
            what = ", ".join(other) or "the record of model or text, which is missing"
            notes.insert(0, f"Other than in the first table: {what}.")
        found.append(replace(table, notes=notes))
    return found


def _perplexity_table(group: Group, title: str) -> ResultTable:
    domains = list(
        dict.fromkeys(
            domain
            for _, results in group.members
            for row in results["perplexity"].values()
            for domain in row
        )
    )
    rows = [
        (run, method, results["perplexity"])
        for run, results in group.members
        for method in _masks_of(results)
    ]
    score = {
        (run.name, method): fmean(math.log(table[method][domain]) for domain in domains)
        for run, method, table in rows
        if all(table.get(method, {}).get(domain) for domain in domains)
    }
    order = sorted(score, key=lambda key: score[key])
    header = ["run", "rank", "pattern"]
    for domain in domains:
        header += [f"{domain} dense", "one-shot", "mask", "x dense"]
    cells = []
    for run, method, table in rows:
        key = (run.name, method)
        cells.append(
            [
                run.name if method == LEARNED else f"{run.name}: {method_label(method)}",
                str(order.index(key) + 1) if key in score else NOTHING,
                str(run.masks[method].patterns) if method in run.masks else NOTHING,
                *(cell for domain in domains for cell in _domain_cells(method, table, domain)),
            ]
        )
    notes = [
        "Rank: by the mean over the domains of the log of the mask's perplexity. One-shot: the "
        "lowest of the run's masks that leave the weights as they are.",
        f"Protocol: {format_protocol(dict(group.protocol))}."
        if group.protocol
        else "The protocol was not recorded.",
    ]
    by_rank = sorted(cells, key=lambda row: int(row[1]) if row[1] != NOTHING else len(cells) + 1)
    named = [(row[0], row) for row in by_rank]
    return ResultTable(title, header, named, notes)


def _masks_of(results: Mapping[str, Any]) -> list[str]:
    """The rows of a run that are ranked: the learned mask and masks of other names; where there are
    none, the learned mask, whose cells are empty.
    """
    table = results["perplexity"]
    others = [row for row in table if base_method(row) not in METHOD_LABELS]
    return [*([LEARNED] if LEARNED in table or not others else []), *others]


def _domain_cells(
    method: str, table: Mapping[str, Mapping[str, float | None]], domain: str
) -> list[str]:
    values = {name: value for name, row in table.items() if (value := row.get(domain)) is not None}
    best = best_one_shot(values)
    value, dense = values.get(method), values.get(DENSE)
    return [
        format_perplexity(dense),
        f"{format_perplexity(values[best])} {method_label(best)}" if best else NOTHING,
        format_perplexity(value),
        f"{value / dense:,.2f}" if value and dense else NOTHING,
    ]


def tasks_tables(runs: Sequence[RunFacts]) -> list[ResultTable]:
    """A table for each model and protocol: the accuracies of every row of every run."""
    groups = groups_of(runs, lambda run: run.tasks)
    return _told_apart(groups, "Tasks", _tasks_table)


def _tasks_table(group: Group, title: str) -> ResultTable:
    rows: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    patterns: dict[str, str] = {}
    for run, results in group.members:
        rows |= {f"{run.name}: {method_label(row)}": one for row, one in results["tasks"].items()}
        groups |= results.get("groups", {})
        known = results.get("pattern", {}).items()
        patterns |= {f"{run.name}: {method_label(row)}": one for row, one in known}
    header, cells = tasks_cells({"tasks": rows, "groups": groups, "pattern": patterns})
    protocol = format_protocol(dict(group.protocol))
    notes = [NOTE, f"Protocol: {protocol}." if protocol else "The protocol was not recorded."]
    return ResultTable(title, ["run", *header[1:]], list(zip(rows, cells, strict=True)), notes)


def masks_table(runs: Sequence[RunFacts]) -> ResultTable | None:
    """Every mask file of every run with its size; None where there is none."""
    rows = []
    for run in runs:
        for method, one in run.masks.items():
            codings = sorted({coding_of(about) for about in one.meta["tensors"].values()})
            label = f"{run.name}: {method_label(method)}"
            size = [format_bytes(one.size), f"{bits(one):.3f}"] if len(one) else [NOTHING] * 2
            cells = [label, str(one.patterns), f"{len(one):,}", ", ".join(codings), *size]
            rows.append((label, cells))
    header = ["mask", "pattern", "linears", "coding", "file", "bits a weight"]
    return ResultTable("Mask files", header, rows) if rows else None


def settings_table(runs: Sequence[RunFacts]) -> ResultTable:
    """The settings that differ between the runs, by key. A path below a run folder is written
    relative to it.
    """
    flat = {
        run.name: {
            key: below_run(value, run.settings.run_dir)
            for key, value in flatten(run.settings.model_dump(mode="json")).items()
            if key != "run_dir"
        }
        for run in runs
        if run.settings
    }
    without = [run.name for run in runs if not run.settings]
    notes = [f"No settings of a learning run: {', '.join(without)}."] if without else []
    return _differences("Settings that differ", flat, notes)


def versions_table(runs: Sequence[RunFacts]) -> ResultTable:
    """The versions and parts of the machine that differ between the learning runs."""
    flat = {run.name: run.data.versions for run in runs if run.data.versions}
    return _differences("Versions and machines that differ", flat, [])


def _differences(
    title: str, flat: Mapping[str, Mapping[str, Any]], notes: Sequence[str]
) -> ResultTable:
    """A row for each key whose values are not all the same, a column for each run."""
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = []
    for key in keys:
        texts = [_text(values[key]) if key in values else NOTHING for values in flat.values()]
        if len(set(texts)) > 1:
            rows.append((key, [key, *texts]))
    if not rows:
        few = len(flat) < 2
        return ResultTable(title, [], [], [*notes, "Fewer than two runs." if few else "None."])
    return ResultTable(title, ["key", *flat], rows, notes, is_text=True)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
