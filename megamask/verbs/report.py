"""The verb report: pictures, one HTML page and the table, from whatever the run directory holds; or
one page that compares several runs.
"""

from __future__ import annotations

from pathlib import Path

from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.report.compose import draw_pictures
from megamask.report.html import render_report
from megamask.report.reading import read_run
from megamask.report.results_table import format_table
from megamask.report.run_facts import read_runs, read_settings_of
from megamask.report.run_page import comparison_sections, render_comparison
from megamask.storage import atomic_file, require_file_place, require_writable
from megamask.tables import table
from megamask.terminal import tell
from megamask.verbs.own_arguments import ReportArguments
from megamask.verbs.status import learning_state

ONE_RUN = ReportArguments()


def run(config: Config, arguments: ReportArguments = ONE_RUN) -> None:
    """Write ``report.html`` and ``pictures/*.png`` in the run directory, and print the table; or
    write the comparison of several runs.

    A picture whose artefact is missing is named, with the verb that makes the artefact.

    Raises:
        ArtifactError: there is nothing to report, an artefact is broken, or the folder cannot be
            written.
        ConfigError: the page of a comparison has no name of an HTML file.
    """
    if arguments.comparison is not None:
        _compare(arguments, arguments.comparison)
    else:
        _report(config)


def _report(config: Config) -> None:
    run_dir = run_paths(config).run_dir
    if own := read_settings_of(run_dir):
        config = _of_run(config, own)
    data = read_run(config)
    require_writable(run_dir / "pictures")
    pictures = draw_pictures(config, data, run_dir / "pictures")
    _write(run_dir / "report.html", render_report(config, data, pictures))
    if data.results.get("perplexity"):
        tell(format_table(data.results))
    for protocol, results in data.published.items():
        tell(f"\n{protocol}\n\n{format_table(results)}")
    for sentence in data.said:
        tell(f"\n{sentence}")
    for picture in pictures:
        if picture.path is None:
            tell(f"{picture.title}: not there yet. {picture.missing}")
    tell(f"\nReport: {run_dir / 'report.html'}")


def _of_run(given: Config, own: Config) -> Config:
    """The settings of a report: those of the run where none were given, and otherwise the given
    ones, but for what was learned and from which seed, which the run alone knows.
    """
    if given == Config(run_dir=given.run_dir):
        return own.model_copy(update={"run_dir": given.run_dir})
    return given.model_copy(update={"seed": own.seed, "learn": own.learn})


def _compare(arguments: ReportArguments, out: Path) -> None:
    if out.suffix != ".html":
        allowed = "a file whose name ends in .html"
        raise ConfigError("--out", str(out), allowed, "Write --out comparison.html.")
    if not arguments.runs:
        allowed = "the page of a comparison, which needs run folders"
        raise ConfigError("--out", str(out), allowed, "Write megamask report RUN RUN --out FILE.")
    found = read_runs(arguments.runs, learning_state)
    if not found.runs and not found.tables:
        problem = " ".join(found.said) or "hold nothing"
        raise ArtifactError("the given folders", f"hold no run: {problem}", "Name run folders.")
    require_file_place(out, "--out")
    sections = comparison_sections(found)
    _write(out, render_comparison(found, sections))
    for section in sections:
        if section.title.startswith(("Runs", "Perplexity")):
            rows = [list(cells) for _, cells in section.rows]
            tell("\n".join(["", section.title, "", *table(list(section.header), rows)]))
    for sentence in found.said:
        tell(sentence)
    tell(f"\nComparison: {out}")


def _write(path: Path, page: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
