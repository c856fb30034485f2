"""Tokenizing a domain, as the verb tokenize does once it has loaded the tokenizer, against the
tokenizer's own batches, on the same text in the same run.

python -m benchmarks.tokenizing --tokenizer runs/quickstart/hf --megabytes 32 --json tokenizing.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Timings, Work, interleave, parser, report, table
from megamask.config import build_config
from megamask.data import stdlib
from megamask.data.tokenizer import load_tokenizer
from megamask.data.write_shards import settings_digest, write_domain
from megamask.process.cores import usable_cores

VERB, RAW = "megamask", "encode_batch of tokenizers"


def main(argv: list[str] | None = None) -> int:
    """Time both sides in turn; print and write the figures."""
    known = parser(__doc__ or "")
    known.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
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
    for what, ratio in (("rate", figures["ratio"]), ("CPU seconds", figures["cpu_ratio"])):
        print(f"\n{what}: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) of raw")
    report("tokenizing", options, figures, torch.device("cpu"))
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Megabytes a second of both sides, and the rate of the verb over that of the tokenizer."""
    from tokenizers import Tokenizer

    texts = write_text(folder / "text", int(options.megabytes * 1e6), options.files)
    plain = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    config = build_config(
        {
            "run_dir": str(folder / "run"),
            "data": {
                "tokenizer": str(options.tokenizer),
                "processes": options.processes,
                "domains": {"text": {"kind": "jsonl", "path": str(folder / "text")}},
            },
        }
    )

    tokenizer = load_tokenizer(config)
    seconds: dict[str, list[float]] = {VERB: [], RAW: []}

    def verb() -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        begin = cpu_seconds()
        write_domain(config, "text", tokenizer, settings_digest(config, "text", tokenizer))
        seconds[VERB].append(cpu_seconds() - begin)

    def raw() -> None:
        """The tokenizer alone, as it works when nobody asks for the ids, with threads of its own on
        all documents at once.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        os.environ["RAYON_NUM_THREADS"] = str(options.processes)
        begin = cpu_seconds()
        plain.encode_batch_fast(texts, add_special_tokens=False)
        seconds[RAW].append(cpu_seconds() - begin)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    work: dict[str, Work] = {VERB: verb, RAW: raw}
    timings = interleave(work, options.rounds, torch.device("cpu"), warmup=0)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "megabytes": megabytes,
        "documents": len(texts),
        "ratio": timings.ratio(RAW, VERB),
        "cpu_ratio": Timings(seconds).ratio(VERB, RAW),
        **{f"mb_s {side}": megabytes / timings.median(side) for side in work},
        **{f"cpu_s_a_mb {side}": Timings(seconds).median(side) / megabytes for side in work},
    }


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
