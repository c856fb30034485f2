"""Tables of one-shot masks, budgets, patterns, priors, schedules, reordering and recovery.

    ./launch/quickstart.sh                                # or another prepared run
    STUDY="python -m studies.evidence --base runs/quickstart --out runs/evidence"
    $STUDY --list
    $STUDY --jobs 'oneshot-*' 'learn-2-4-*'
    $STUDY                                                # all other jobs
    $STUDY --report-only --report-to docs/results

The same command goes on where it stopped, and several processes may work on the same ``--out``. A
report keeps the results that an earlier report in its folder has, where settings and model are
those of the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megamask.errors import EXIT_OK
from megamask.storage import require_writable
from megamask.user_paths import path_argument
from studies.child import REPO, ArmError, heed_sigterm
from studies.command import (
    EXIT_SOME_FAILED,
    check_base,
    check_heldout,
    ended,
    select,
    split_settings,
)
from studies.evidence.chapters import all_jobs
from studies.evidence.job import Job
from studies.evidence.report import write_report
from studies.evidence.runs import Study, run_job


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected jobs, then write the report."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    return ended("evidence", lambda: work(options))


def work(options: argparse.Namespace) -> int:
    """The exit code of the command.

    Raises:
        MegamaskError: an option or a setting cannot work, or there is nothing to report.
    """
    jobs = select({job.name: job for job in all_jobs()}, options.jobs, "--jobs", "a job")
    options.out.mkdir(parents=True, exist_ok=True)
    require_writable(options.out, "--out")
    check_base(options.base, ("hf", "weights", "shards"))
    study = Study(
        options.base.resolve(),
        options.out.resolve(),
        options.recipe,
        tuple(options.settings),
        options.minutes,
    )
    if options.list:
        for job in jobs:
            seeds = options.seeds if job.is_seeded else options.seeds[:1]
            done = sum(study.result(job, seed) is not None for seed in seeds)
            print(f"{job.name:28} {done} of {len(seeds)}")
        return EXIT_OK
    failed = 0 if options.report_only else run_all(study, jobs, options.seeds)
    print(f"wrote {write_report(study, options.report_to or study.out, options.seeds)}")
    return EXIT_SOME_FAILED if failed else EXIT_OK


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The options; every word ``key=value`` is a setting, wherever it stands."""
    settings, rest = split_settings(words)
    options = argparse.ArgumentParser(
        prog="python -m studies.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [key=value ...]",
    )
    runs = REPO / "runs"
    recipe = REPO / "configs" / "recipes" / "quickstart.yaml"
    options.add_argument("--base", type=path_argument, default=runs / "quickstart", metavar="RUN")
    options.add_argument("--out", type=path_argument, default=runs / "evidence", metavar="DIR")
    options.add_argument("--recipe", type=path_argument, default=recipe, help="text and settings")
    options.add_argument(
        "--jobs", nargs="+", metavar="GLOB", help="which jobs, in this order (default: all)"
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[1234], metavar="N")
    options.add_argument("--minutes", type=float, default=600, help="longest time of one verb")
    options.add_argument("--list", action="store_true", help="name the jobs and what is done")
    options.add_argument("--report-only", action="store_true")
    options.add_argument(
        "--report-to",
        type=path_argument,
        metavar="DIR",
        help="folder of the report (default: --out)",
    )
    found = options.parse_args(rest)
    found.settings = settings
    return found


def run_all(study: Study, jobs: Sequence[Job], seeds: Sequence[int]) -> int:
    """Run the jobs, one after the other; the failure of a job is told, and the others go on.

    Returns:
        The number of failures.
    """
    heed_sigterm()
    for job in jobs:
        check_heldout(study.config(job))  # settings that cannot work are refused first
    failed = 0
    for job in jobs:
        for seed in seeds if job.is_seeded else seeds[:1]:
            try:
                run_job(study, job, seed)
            except ArmError as error:
                failed += 1
                print(f"{job.name}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
