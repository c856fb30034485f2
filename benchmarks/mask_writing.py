"""Time to write a mask file from hard codes, against a copy of the codes.

python -m benchmarks.mask_writing --masks subset/2:4 categorical/2:4 --json mask-writing.json
"""

from __future__ import annotations

import sys
import tempfile
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Work, interleave, parser, report, table
from megamask.masks import codec
from megamask.masks.header import Facts
from megamask.masks.save import save_codes
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan

FILE, PACK, BOOL, COPY = "mask file", "packing alone", "from a bool mask", "copy of the codes"


def main(argv: list[str] | None = None) -> int:
    """Time every kind of mask; print and write the figures."""
    known = parser(__doc__ or "")
    known.add_argument("--masks", nargs="+", default=["subset/2:4", "categorical/2:4"])
    known.add_argument("--rows", type=int, default=4096)
    known.add_argument("--columns", type=int, default=11008)
    known.add_argument("--linears", type=int, default=2)
    options = known.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.masks:
            figures[kind] = measure(kind, options, Path(folder))
    rows = [
        [kind, *(one[f"ns_a_group {side}"] for side in (FILE, PACK, BOOL, COPY)), one["peak_mib"]]
        for kind, one in figures.items()
    ]
    table(
        f"{options.linears} linears of {options.rows} x {options.columns}, "
        f"ns a group, the fastest of {options.rounds} rounds",
        ["masks", FILE, PACK, BOOL, COPY, "MiB beside the codes"],
        rows,
    )
    report("mask_writing", options, figures, torch.device("cpu"))
    return 0


def measure(kind: str, options: Any, folder: Path) -> dict[str, Any]:
    """Nanoseconds a group of every side, and MiB that numpy allocates while a file is written."""
    name, _, text = kind.partition("/")
    distribution, pattern = DISTRIBUTIONS[name], Pattern.parse(text)
    groups = options.columns // pattern.m
    shapes = {
        f"linear-{number}": (options.rows, groups * pattern.m) for number in range(options.linears)
    }
    logits = torch.randn(options.rows, distribution.logits_per_group(pattern), groups)
    mask_OI = distribution.hard_mask(logits, pattern)
    bits = pattern.bits_of(mask_OI)
    index = torch.from_numpy(pattern.index_of_bits(bits).astype("int64"))
    codes = (bits if name == "subset" else index).to(distribution.code_dtype(pattern))
    assert torch.equal(distribution.mask_of(codes, pattern), mask_OI)
    index_of, base = partial(distribution.index_of, pattern=pattern), pattern.num_candidates
    target = torch.empty_like(codes)

    def write() -> None:
        save_codes(
            folder / "mask.safetensors",
            shapes,
            ((one, codes) for one in shapes),
            distribution.index_of,
            PatternPlan.uniform([*shapes], pattern),
            Facts("f" * 64, "learned"),
        )

    sides: dict[str, Work] = {
        FILE: write,
        PACK: lambda: [codec.pack(codes, base, index_of) for _ in shapes],
        BOOL: lambda: [codec.pack(pattern.bits_of(mask_OI), base, pattern.index_of_bits)],
        COPY: lambda: [target.copy_(codes) for _ in shapes],
    }
    timings = interleave(sides, options.rounds, torch.device("cpu"))
    tracemalloc.start()
    write()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    count = {side: codes.numel() * (1 if side == BOOL else len(shapes)) for side in sides}
    fastest = {
        f"ns_a_group {side}": 1e9 * min(timings.seconds[side]) / count[side] for side in sides
    }
    return {**fastest, "peak_mib": peak, "groups": codes.numel() * len(shapes)}


if __name__ == "__main__":
    sys.exit(main())
