"""A real model through the verbs in one process: convert, tokenize, prune, learn, evaluate. Prints
the seconds of each verb, the held-out perplexities and the speed of learning.

``--against FILE`` sets the losses beside those of an earlier run, whose ``--json`` wrote FILE: the
curve of a GPU against that of a CPU. ``--learn-seconds N`` ends learning after N seconds, as a
signal does, and what was learned until then is told.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import table
from megamask.__main__ import main as megamask
from megamask.errors import EXIT_INTERRUPTED
from megamask.storage import write_json
from megamask.user_paths import path_argument

VERBS = ("convert", "tokenize", "prune", "learn", "evaluate")


def main(argv: list[str] | None = None) -> int:
    """Run the verbs, print, write; the exit code of the verb that failed."""
    options = read_options(argv)
    is_file = options.model.is_file()
    settings = [
        *("--config", str(options.recipe), f"run_dir={options.run_dir}"),
        *(f"device={options.device}", f"learn.steps={options.steps}"),
        *("learn.monitor.sinks=[]", "prune.methods=[sparsegpt]"),
        f"model.{'gguf' if is_file else 'hf'}={options.model}",
    ]
    seconds: dict[str, float] = {}
    for verb in ("gguf", *VERBS) if is_file else VERBS:
        begin = time.monotonic()
        limit = options.learn_seconds if verb == "learn" else None
        with same_handlers(), ended_after(limit):
            code = megamask([verb, *settings])
        seconds[verb] = time.monotonic() - begin
        print(f"{verb}: {seconds[verb]:.1f} s, exit code {code}", flush=True)
        if code == EXIT_INTERRUPTED and limit:
            break
        if code:
            return code
    figures = {"seconds": seconds, **read_results(options.run_dir)}
    if options.against:
        before = json.loads(options.against.read_text())
        figures["against"] = distance(figures["losses"], before["losses"])
    show(figures)
    if options.json:
        write_json(options.json, figures)
    return 0


@contextmanager
def same_handlers() -> Iterator[None]:
    """Give the package's logger its handlers back: every call of the program adds a handler, and
    a second handler prints every line again.
    """
    logger = logging.getLogger("megamask")
    before = list(logger.handlers)
    try:
        yield
    finally:
        logger.handlers = before


@contextmanager
def ended_after(seconds: float | None) -> Iterator[None]:
    """Send this process SIGTERM when the block takes longer."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", required=True)
    options.add_argument("--model", type=path_argument, required=True, help="folder or GGUF file")
    options.add_argument("--recipe", type=path_argument, required=True)
    options.add_argument("--steps", type=int, required=True)
    options.add_argument("--run-dir", type=path_argument, required=True)
    options.add_argument("--against", type=path_argument, help="the --json file of an earlier run")
    options.add_argument("--learn-seconds", type=float, help="end learning after so many")
    options.add_argument("--json", type=path_argument)
    return options.parse_args(argv)


def read_results(run_dir: Path) -> dict[str, Any]:
    """Perplexities by method and domain, and the steps' losses and speeds."""
    records = [
        json.loads(line) for line in (run_dir / "learn/metrics.jsonl").read_text().splitlines()
    ]
    steps = [record for record in records if record["kind"] == "train"]
    results = run_dir / "results.json"
    evaluated = json.loads(results.read_text())["perplexity"] if results.exists() else {}
    return {
        "perplexity": evaluated,
        "losses": [step["loss"] for step in steps],
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
    }


def distance(losses: list[float], before: list[float]) -> dict[str, float]:
    """How far two curves of losses are apart: at the first step, which nothing was learned before,
    at most within ten steps, and in the means of the last tenth of their common steps.
    """
    common = min(len(losses), len(before))
    apart = [abs(mine - theirs) for mine, theirs in zip(losses, before, strict=False)]
    last = max(common // 10, 1)
    mine, theirs = (statistics.fmean(one[common - last : common]) for one in (losses, before))
    return {
        "common steps": common,
        "apart at step 1": apart[0],
        "most apart in steps 1 to 10": max(apart[:10]),
        "mean of the last tenth": mine,
        "the same of the other run": theirs,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    perplexity = figures["perplexity"]
    if perplexity:
        domains = list(next(iter(perplexity.values())))
        rows = [[name, *(row[domain] for domain in domains)] for name, row in perplexity.items()]
        table("held-out perplexity", ["method", *domains], rows)
    if "against" in figures:
        curve = [list(pair) for pair in figures["against"].items()]
        table("loss in nats against the other run", ["what", "measured"], curve)
    table("seconds", ["verb", "seconds"], [list(pair) for pair in figures["seconds"].items()])
    steps, speed = len(figures["losses"]), figures["tokens_per_second"]
    print(f"\n{steps} learning steps, median {speed:,.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
