"""Tokenizing a domain, as the verb tokenize does once it has loaded the tokenizer, against the
tokenizer's own batches, on the same text in the same run.

Each round runs every side in a forked process of its own, which begins with the same memory: empty
caches of the tokenizer and no threads. The verb also tokenizes one file alone, and what a file
takes tells the start of the processes from the steady rate.

python -m benchmarks.tokenizing --tokenizer runs/quickstart/hf --megabytes 32 --json tokenizing.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Timings, Work, parser, report, table
from megamask.config import build_config
from megamask.data import stdlib
from megamask.data.tokenizer import load_tokenizer
from megamask.data.write_shards import settings_digest, write_domain
from megamask.process.cores import usable_cores
from megamask.user_paths import path_argument

VERB, FILE, RAW = "megamask", "megamask, one file", "encode_batch_fast of tokenizers"


def main(argv: list[str] | None = None) -> int:
    """Time both sides in turn; print and write the figures."""
    known = parser(__doc__ or "")
    known.add_argument(
        "--tokenizer", type=path_argument, required=True, help="folder with tokenizer.json"
    )
    known.add_argument("--megabytes", type=float, default=32, help="of text (default: 32)")
    known.add_argument("--files", type=int, default=8, help="files of JSON lines (default: 8)")
    known.add_argument("--processes", type=int, help="default: the cores of this process")
    options = known.parse_args(argv)
    options.processes = options.processes or len(usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    sides = [[side, figures[f"mb_s {side}"], figures[f"cpu_s_a_mb {side}"]] for side in (VERB, RAW)]
    title = f"{figures['megabytes']:.1f} MB of text, {options.processes} processes"
    table(title, ["side", "MB/s", "CPU seconds a MB"], sides)
    print()
    for what in ("rate", "steady rate", "CPU seconds"):
        ratio = figures[what]
        low, median, high = ratio["low"], ratio["median"], ratio["high"]
        print(f"{what}: {median:.2f} ({low:.2f} to {high:.2f}) of {RAW}")
    print(f"start: {figures['start']:.2f} s, {figures['start_cpu']:.2f} CPU seconds")
    report("tokenizing", options, figures, torch.device("cpu"))
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Megabytes a second of both sides, and the rate of the verb over that of the tokenizer."""
    from tokenizers import Tokenizer

    texts = write_text(folder / "text", int(options.megabytes * 1e6), options.files)
    plain = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    paths = {"text": folder / "text", "file": folder / "text" / "000.jsonl"}
    config = build_config(
        {
            "run_dir": str(folder / "run"),
            "data": {
                "tokenizer": str(options.tokenizer),
                "processes": options.processes,
                "domains": {
                    name: {"kind": "jsonl", "path": str(path)} for name, path in paths.items()
                },
            },
        }
    )
    tokenizer = load_tokenizer(config)

    def verb(domain: str) -> None:
        write_domain(config, domain, tokenizer, settings_digest(config, domain, tokenizer))

    def raw() -> None:
        """The tokenizer alone, as it works when nobody asks for the ids, with threads of its own on
        all documents at once.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        os.environ["RAYON_NUM_THREADS"] = str(options.processes)
        plain.encode_batch_fast(texts, add_special_tokens=False)

    work: dict[str, Work] = {VERB: lambda: verb("text"), FILE: lambda: verb("file"), RAW: raw}
    seconds: dict[str, list[float]] = {side: [] for side in work}
    cpu: dict[str, list[float]] = {side: [] for side in work}
    for _ in range(options.rounds):
        for side in work:
            wall_time, cpu_time = apart(work[side])
            seconds[side].append(wall_time)
            cpu[side].append(cpu_time)
        shutil.rmtree(folder / "run")
    size = sum(len(text.encode()) for text in texts) / 1e6
    share = (
        sum(len(text.encode()) for text in texts[: -(-len(texts) // options.files)]) / 1e6 / size
    )
    timings, cpu_timings = Timings(seconds), Timings(cpu)
    steady = {RAW: seconds[RAW], VERB: without_start(seconds, share)}
    return {
        "megabytes": size,
        "documents": len(texts),
        "rate": timings.ratio(RAW, VERB),
        "steady rate": Timings(steady).ratio(RAW, VERB),
        "CPU seconds": cpu_timings.ratio(VERB, RAW),
        "start": started(seconds, share),
        "start_cpu": started(cpu, share),
        "seconds": seconds,
        "cpu_seconds": cpu,
        **{f"mb_s {side}": size / timings.median(side) for side in (VERB, RAW)},
        **{f"cpu_s_a_mb {side}": cpu_timings.median(side) / size for side in (VERB, RAW)},
    }


def without_start(seconds: dict[str, list[float]], share: float) -> list[float]:
    """Seconds of the whole text in each round, were the start of the processes for nothing.

    Args:
        seconds: of the whole text and of one file.
        share: of the text that is in that file.
    """
    pairs = zip(seconds[VERB], seconds[FILE], strict=True)
    return [(whole - file) / (1 - share) for whole, file in pairs]


def started(seconds: dict[str, list[float]], share: float) -> float:
    """Median seconds of the start; arguments as in ``without_start``."""
    steady = without_start(seconds, share)
    return statistics.median(
        whole - rest for whole, rest in zip(seconds[VERB], steady, strict=True)
    )


def apart(work: Work) -> tuple[float, float]:
    """Seconds and CPU seconds of work in a forked process, with the processes that it starts."""
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe()

    def run() -> None:
        begin, cpu = time.perf_counter(), cpu_seconds()
        work()
        other.send((time.perf_counter() - begin, cpu_seconds() - cpu))

    process = context.Process(target=run)
    process.start()
    other.close()
    try:
        wall_time, cpu_time = mine.recv()
    finally:
        process.join()
    return wall_time, cpu_time


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def write_text(folder: Path, size: int, files: int) -> list[str]:
    """Write files of JSON lines with the sources of Python's library, again and again until there
    are ``size`` bytes; returns the documents.
    """
    folder.mkdir()
    texts: list[str] = []
    left = size
    for text in cycle(stdlib.sources()):
        if left <= 0:
            break
        texts.append(text)
        left -= len(text.encode())
    for number in range(files):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::files])
        (folder / f"{number:03d}.jsonl").write_text("".join(lines))
    return [text for number in range(files) for text in texts[number::files]]


if __name__ == "__main__":
    sys.exit(main())
