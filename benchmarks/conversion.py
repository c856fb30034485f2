"""Hugging Face -> Megatron and back against a plain copy of the same bytes.

python -m benchmarks.conversion --megabytes 2000 --json conversion.json
"""

from __future__ import annotations

import argparse
import filecmp
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Timings, parser, report, table
from megamask.config import Config, build_config
from megamask.masks.file import save_masks
from megamask.sparsity.pattern import Pattern
from megamask.storage import write_json
from megamask.verbs import convert, export
from megamask.weights.architecture import read_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.file_stream import Streamed
from megamask.weights.hf_files import write_tensors
from megamask.weights.mapping import expected_tensors, linear_shapes

COPY, CONVERT, EXPORT = "plain copy", "convert", "export"
MASKED, MEGATRON = "export with a mask", "export as Megatron"
VOCAB = 32_000
_ANONYMOUS = re.compile(r"Rss(?:Anon|Shmem):\s+(\d+) kB")


def main(argv: list[str] | None = None) -> int:
    """Time the sides in turn; print and write the figures."""
    known = parser(__doc__ or "")
    known.add_argument("--megabytes", type=float, default=2000, help="of weights (default: 2000)")
    known.add_argument("--hidden", type=int, default=2048, help="width (default: 2048)")
    known.add_argument("--masked", action="store_true", help="also export with a 2:4 mask")
    known.add_argument("--folder", help="where the files lie meanwhile (default: a temporary one)")
    options = known.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(options, Path(folder))
    layers = 2 * figures["layer_bytes"] / 1e6
    sides = [
        [
            side,
            figures["gb_s"][side],
            figures["ratio"][side]["median"],
            figures["cpu_s"][side],
            figures["peak_mb"][side],
            figures["peak_mb"][side] / layers,
        ]
        for side in figures["gb_s"]
    ]
    layer, embedding = figures["layer_bytes"] / 1e6, figures["embedding_bytes"] / 1e6
    title = (
        f"{figures['bytes'] / 1e6:,.0f} MB in bf16, {figures['layers']} layers of {layer:.1f} MB"
    )
    title += f", embedding {embedding:.1f} MB"
    memory = ["MB of memory beside the imports", "of two layers"]
    table(title, ["side", "GB/s", "time / copy", "CPU s", *memory], sides)
    report("conversion", options, figures, torch.device("cpu"))
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rate, time over that of a copy, and peak of memory of every side."""
    hf, run_dir = folder / "hf", folder / "run"
    keys, facts = shape(int(options.megabytes * 1e6), options.hidden)
    in_process(lambda: make_model(hf, keys))  # this process starts no threads before it forks
    mask = folder / "mask.safetensors"
    if options.masked:
        in_process(lambda: make_mask(hf, mask))

    def config(**of_export: str) -> Config:
        settings = {"weights": str(run_dir / "weights"), "mask": "dense", **of_export}
        model = {"hf": str(hf)}
        return build_config(
            {"run_dir": str(run_dir), "device": "cpu", "model": model, "export": settings}
        )

    sides: dict[str, Callable[[], None]] = {
        COPY: lambda: copy(hf / "model.safetensors", folder / "copy"),
        CONVERT: lambda: convert.run(config()),
        EXPORT: lambda: export.run(config()),
        MEGATRON: lambda: export.run(config(format="megatron", out=str(run_dir / "megatron"))),
    }
    if options.masked:
        sides[MASKED] = lambda: export.run(config(mask=str(mask), out=str(run_dir / "masked")))
    cpu_seconds: dict[str, list[float]] = {side: [] for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for _ in range(options.rounds):
        for output in (folder / "copy", run_dir):
            shutil.rmtree(output, ignore_errors=True)
        for side, work in sides.items():
            took, peak, used = in_process(work)
            seconds[side].append(took)
            cpu_seconds[side].append(used)
            peaks[side] = max(peaks[side], peak)
        ours, theirs = (folder / "model.safetensors" for folder in (run_dir / "export", hf))
        assert filecmp.cmp(ours, theirs, shallow=False), "the model did not come back bit for bit"
    timings = Timings(seconds)
    return {
        **facts,
        "gb_s": {side: facts["bytes"] / 1e9 / timings.median(side) for side in sides},
        "ratio": {side: timings.ratio(side, COPY) for side in sides},
        "cpu_s": {side: statistics.median(used) for side, used in cpu_seconds.items()},
        "peak_mb": peaks,
    }


def shape(size: int, hidden: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The config.json of a Llama of about ``size`` bytes, and its facts."""
    ffn = 11 * hidden // 4
    layer = 2 * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden)
    embedding = 2 * min(VOCAB, size // (8 * hidden)) * hidden
    layers = max(1, round((size - embedding) / layer))
    keys = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "vocab_size": embedding // (2 * hidden),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    facts = {
        "bytes": layers * layer + embedding + 2 * hidden,
        "layers": layers,
        "layer_bytes": layer,
        "embedding_bytes": embedding,
    }
    return keys, facts


def make_model(hf: Path, keys: dict[str, Any]) -> None:
    """Write a model with random weights."""
    hf.mkdir()
    write_json(hf / "config.json", keys)
    expected = expected_tensors(read_architecture(hf))
    source = torch.Generator().manual_seed(0)
    pool = torch.randn(2**22, generator=source).to(torch.bfloat16)

    def blocks(number: int, count: int) -> Iterator[torch.Tensor]:
        turned = pool.roll(number)  # no two tensors are equal
        for start in range(0, count, len(pool)):
            yield turned[: min(count - start, len(pool))]

    tensors = [
        (name, Streamed(shape, pool.dtype, partial(blocks, number, torch.Size(shape).numel())))
        for number, (name, shape) in enumerate(expected.items())
    ]
    write_tensors(hf, tensors, max_shard_bytes=10**12)


def make_mask(hf: Path, path: Path) -> None:
    """Write a 2:4 mask by magnitude."""
    base, pattern = BaseModel(hf), Pattern(2, 4)
    with base.open() as source:
        masks = {
            name: pattern.best(source.tensor(f"{name}.weight").abs())
            for name in linear_shapes(base.architecture())
        }
    exact = base.fingerprints().exact
    save_masks(path, masks, pattern, fingerprint=exact, method="magnitude")


def copy(source: Path, folder: Path) -> None:
    """Copy a file to the disk itself, as the verbs do with what they write."""
    folder.mkdir()
    target = folder / source.name
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 2**22)
        writer.flush()
        os.fsync(writer.fileno())


def in_process(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds of ``work`` in a forked process; MB of memory at its peak, without pages that are
    files and without what the process had before; and CPU seconds, of its children too.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        theirs.recv()
        begin = time.perf_counter()
        work()
        took = time.perf_counter() - begin
        users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        used = [resource.getrusage(one) for one in users]
        theirs.send((took, sum(one.ru_utime + one.ru_stime for one in used)))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    before = peak = memory(process.pid)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ours.send(None)
        seconds, used = ours.recv()
    finally:
        done.set()
        watcher.join()
        process.join()
    return seconds, (peak - before) / 1e6, used


def memory(process: int | None) -> float:
    """Bytes of a process that are no file; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return sum(1024 * int(found) for found in _ANONYMOUS.findall(status))


if __name__ == "__main__":
    sys.exit(main())
