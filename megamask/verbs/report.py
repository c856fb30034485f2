"""The verb report: pictures, one HTML page and the table, from whatever the run directory holds."""

from __future__ import annotations

from megamask.config import Config, run_paths
from megamask.report.compose import draw_pictures
from megamask.report.html import render_report
from megamask.report.reading import read_run
from megamask.report.results_table import format_table
from megamask.storage import atomic_file, require_writable
from megamask.terminal import tell


def run(config: Config) -> None:
    """Write ``report.html`` and ``pictures/*.png`` in the run directory, and print the table.

    A picture whose artefact is missing is named, with the verb that makes the artefact.

    Raises:
        ArtifactError: there is nothing to report, an artefact is broken, or the folder cannot be
            written.
    """
    data = read_run(config)
    run_dir = run_paths(config).run_dir
    require_writable(run_dir / "pictures")
    pictures = draw_pictures(config, data, run_dir / "pictures")
    page = render_report(config, data, pictures)
    with atomic_file(run_dir / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    if data.results.get("perplexity"):
        tell(format_table(data.results))
    for protocol, results in data.published.items():
        tell(f"\n{protocol}\n\n{format_table(results)}")
    for picture in pictures:
        if picture.path is None:
            tell(f"{picture.title}: not there yet. {picture.missing}")
    tell(f"\nReport: {run_dir / 'report.html'}")
