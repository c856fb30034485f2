"""Masks of single domains against one mask for all (MaskLLM, Tables 4 and 5).

    ./launch/quickstart.sh                                            # or another prepared run
    python -m studies.domains --base runs/quickstart --out runs/domains --steps 60
    python -m studies.domains --report-only --report-to docs/results

A general mask is learned on all domains. Each domain then gets two masks at equal tokens: `scratch`
starts from the one-shot mask, `transfer` from the general mask's logits. The table has their
held-out perplexities beside those of the dense model, the one-shot mask and the general mask. The
same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megamask.errors import EXIT_OK
from megamask.storage import require_writable
from megamask.user_paths import path_argument
from studies.child import REPO, heed_sigterm
from studies.command import ended, split_settings
from studies.domains.report import write_report
from studies.domains.runs import Study, check, run_domain, run_general


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the report."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    return ended("domains", lambda: work(options))


def work(options: argparse.Namespace) -> int:
    """The exit code of the command.

    Raises:
        MegamaskError: an option or a setting cannot work, or there is nothing to report.
        ArmError: a verb failed.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    require_writable(options.out, "--out")
    study = Study(
        base=options.base.resolve(),
        out=options.out.resolve(),
        recipe=options.recipe,
        settings=tuple(options.settings),
        general_steps=options.general_steps or 2 * options.steps,
        steps=options.steps,
        minutes=options.minutes,
    )
    check(study)
    if not options.report_only:
        heed_sigterm()
        print("all domains ...", flush=True)
        run_general(study)
        for domain in study.domains:
            print(f"{domain} ...", flush=True)
            run_domain(study, domain)
    print(f"wrote {write_report(study, options.report_to or study.out)}")
    return EXIT_OK


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The options; every word ``key=value`` is a setting, wherever it stands."""
    settings, rest = split_settings(words)
    options = argparse.ArgumentParser(
        prog="python -m studies.domains",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [key=value ...]",
    )
    runs = REPO / "runs"
    recipe = REPO / "configs" / "recipes" / "domains.yaml"
    options.add_argument("--base", type=path_argument, default=runs / "quickstart", metavar="RUN")
    options.add_argument("--out", type=path_argument, default=runs / "domains", metavar="DIR")
    options.add_argument(
        "--recipe", type=path_argument, default=recipe, help="domains and settings"
    )
    options.add_argument("--steps", type=int, default=60, help="of each mask of a domain")
    options.add_argument(
        "--general-steps", type=int, metavar="N", help="of the general mask (default: twice)"
    )
    options.add_argument("--minutes", type=float, default=600, help="longest time of one verb")
    options.add_argument("--report-only", action="store_true")
    options.add_argument(
        "--report-to",
        type=path_argument,
        metavar="DIR",
        help="folder of domains.md and domains.json (default: --out)",
    )
    found = options.parse_args(rest)
    found.settings = settings
    return found


if __name__ == "__main__":
    sys.exit(main())
