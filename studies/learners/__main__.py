"""The comparison of learners and the ablations, with a report.

Every arm runs the verbs learn and evaluate of megamask. The quickstart makes the base run, which
holds model, text and one-shot masks; the study starts from it:

    ./launch/quickstart.sh
    STUDY="python -m studies.learners --base runs/quickstart --out runs/learners"
    $STUDY --list
    $STUDY --arms '*-2of4' --seeds 1234 1235 1236
    $STUDY                                               # all other arms
    $STUDY --report-only --report-to docs/results

The same command goes on where it stopped: arms that are done are skipped, and an interrupted run
continues from its snapshot. Other settings make another run. Several processes may work on the same
``--out``. The report has all results that fit the settings of the command. At full length, on a
bigger machine:

    python -m studies.learners --base RUN --out runs/learners-long --steps 2000 \\
        --tokens-per-step 65536 learn.sampling.tau='[4,0.05]'
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megamask.config import load_config
from megamask.errors import EXIT_OK, ConfigError, MegamaskError
from megamask.storage import require_writable
from megamask.user_paths import path_argument
from studies.child import REPO, ArmError, heed_sigterm
from studies.command import EXIT_SOME_FAILED, check_heldout, ended, select, split_settings
from studies.learners.arm import Arm
from studies.learners.arms import by_name
from studies.learners.bench import Bench, Budget
from studies.learners.report import write_report
from studies.learners.runs import run_arm, time_arm


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected arms, then write the report."""
    options = read_options(sys.argv[1:] if argv is None else argv)
    return ended("learners", lambda: work(options))


def work(options: argparse.Namespace) -> int:
    """The exit code of the command.

    Raises:
        MegamaskError: an option or a setting cannot work.
    """
    bench = open_bench(options)
    arms = select(by_name(), options.arms, "--arms", "an arm")
    if options.list:
        print("\n".join(state(bench, arm) for arm in arms))
        return EXIT_OK
    failed = 0 if options.report_only else run_all(bench, arms, options)
    print(f"wrote {write_report(bench, options.report_to or bench.out)}")
    return EXIT_SOME_FAILED if failed else EXIT_OK


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The options; every word ``key=value`` is a setting, wherever it stands."""
    settings, rest = split_settings(words)
    options = parser().parse_args(rest)
    options.settings = settings
    return options


def parser() -> argparse.ArgumentParser:
    """The options. The defaults fit two CPU cores: an arm takes about five minutes there."""
    options = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [key=value ...]",
    )
    options.add_argument(
        "--base",
        type=path_argument,
        default=REPO / "runs" / "quickstart",
        metavar="RUN",
        help="prepared run: weights, shards",
    )
    options.add_argument(
        "--out", type=path_argument, default=REPO / "runs" / "learners", metavar="DIR"
    )
    options.add_argument(
        "--recipe",
        type=path_argument,
        default=REPO / "configs" / "recipes" / "quickstart.yaml",
        help="all but learn is read",
    )
    options.add_argument(
        "--arms",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="which arms, in this order (default: all)",
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[1234], metavar="N")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument(
        "--tokens-per-step", type=int, metavar="N", help="default: one micro-batch"
    )
    options.add_argument("--micro-batch", type=int, default=4, help="sequences")
    options.add_argument(
        "--evaluate-every",
        type=int,
        metavar="STEPS",
        help="points of the curve (default: a third of the steps)",
    )
    options.add_argument(
        "--evaluate-tokens",
        type=int,
        default=16384,
        help="held-out tokens of each domain for the final masks",
    )
    options.add_argument("--minutes", type=float, default=600, help="longest time of one verb")
    options.add_argument(
        "--time",
        type=int,
        metavar="STEPS",
        help="measure the time of a step instead, on a machine with nothing else to do",
    )
    options.add_argument("--list", action="store_true", help="name the arms and what is done")
    options.add_argument("--report-only", action="store_true")
    options.add_argument(
        "--report-to",
        type=path_argument,
        metavar="DIR",
        help="folder of learners.md and learners.png (default: --out)",
    )
    return options


def open_bench(options: argparse.Namespace) -> Bench:
    """The folders and the budget.

    Raises:
        MegamaskError: a folder or a setting cannot work.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    require_writable(options.out, "--out")
    seq = load_config(options.recipe, options.settings).data.seq_length
    tokens = options.tokens_per_step or options.micro_batch * seq
    if tokens % (options.micro_batch * seq):
        allowed = f"a multiple of a micro-batch, {options.micro_batch} x {seq} tokens"
        raise ConfigError("--tokens-per-step", tokens, allowed, "Change it, or --micro-batch.")
    every = options.evaluate_every or max(1, options.steps // 3)
    budget = Budget(
        options.steps,
        options.micro_batch,
        tokens // seq,
        every,
        options.evaluate_tokens,
        options.minutes,
    )
    bench = Bench(options.out.resolve(), options.base.resolve(), budget, tuple(options.settings))
    bench.prepare(options.recipe)
    return bench


def run_all(bench: Bench, arms: list[Arm], options: argparse.Namespace) -> int:
    """Run all seeds of an arm, then those of the next arm.

    The failure of an arm is reported, and the other arms go on.

    Returns:
        The number of failures.

    Raises:
        MegamaskError: the settings of any arm cannot work; raised before the first arm runs.
    """
    for arm in arms:
        check_heldout(bench.config(arm))
    heed_sigterm()
    failed = []
    for arm in arms:
        for seed in options.seeds if arm.learns else options.seeds[:1]:
            if not (bench.is_done(arm, seed) if options.time is None else not arm.learns):
                print(f"{arm.name}, seed {seed} ...", flush=True)
                try:
                    if options.time is None:
                        run_arm(bench, arm, seed)
                    else:
                        time_arm(bench, arm, options.time)
                except ArmError as error:
                    failed.append(arm.name)
                    print(f"{arm.name}, seed {seed}: {error}", file=sys.stderr, flush=True)
    if failed:
        print(f"not done: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
    return len(failed)


def state(bench: Bench, arm: Arm) -> str:
    """A line about an arm for ``--list``."""
    try:
        seeds = [str(result["seed"]) for result in bench.results(arm)]
    except MegamaskError as error:
        return f"{arm.name:<24} cannot run: {error}"
    done = ("done" if not arm.learns else f"done: {' '.join(seeds)}") if seeds else ""
    return f"{arm.name:<24} {arm.pattern:<5} {arm.group:<18} {arm.label:<38} {done}".rstrip()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
