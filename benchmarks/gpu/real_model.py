"""A real model through the verbs in one process: convert, tokenize, prune, learn, evaluate. Prints
the seconds of each verb, the held-out perplexities and the speed of learning.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import table
from megamask.__main__ import main as megamask
from megamask.storage import write_json

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
        with same_handlers():
            code = megamask([verb, *settings])
        seconds[verb] = time.monotonic() - begin
        print(f"{verb}: {seconds[verb]:.1f} s, exit code {code}", flush=True)
        if code:
            return code
    figures = {"seconds": seconds, **read_results(options.run_dir)}
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


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", required=True)
    options.add_argument("--model", type=Path, required=True, help="folder or GGUF file")
    options.add_argument("--recipe", type=Path, required=True)
    options.add_argument("--steps", type=int, required=True)
    options.add_argument("--run-dir", type=Path, required=True)
    options.add_argument("--json", type=Path)
    return options.parse_args(argv)


def read_results(run_dir: Path) -> dict[str, Any]:
    """Perplexities by method and domain, and the steps' losses and speeds."""
    records = [
        json.loads(line) for line in (run_dir / "learn/metrics.jsonl").read_text().splitlines()
    ]
    steps = [record for record in records if record["kind"] == "train"]
    return {
        "perplexity": json.loads((run_dir / "results.json").read_text())["perplexity"],
        "losses": [step["loss"] for step in steps],
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
    }


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    perplexity = figures["perplexity"]
    domains = list(next(iter(perplexity.values())))
    rows = [[method, *(row[domain] for domain in domains)] for method, row in perplexity.items()]
    table("held-out perplexity", ["method", *domains], rows)
    table("seconds", ["verb", "seconds"], [list(pair) for pair in figures["seconds"].items()])
    steps, speed = len(figures["losses"]), figures["tokens_per_second"]
    print(f"\n{steps} learning steps, median {speed:,.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
