"""2:4 inference at LLaMA-2-7B shapes: dense matmul against PyTorch's semi-structured tensors
(cuSPARSELt), in milliseconds and error, from 16 to 16,384 tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import interleave, table
from benchmarks.sampling import layer_shapes
from megamask.sparsity.pattern import Pattern
from megamask.storage import write_json
from megamask.weights.shapes import read_shape

TOKENS = (16, 64, 256, 1024, 4096, 16384)
CALLS = 10  # that one time covers
ROUNDS = 7
# The products are those of the dense kernel in another order, in fp32, rounded to bf16 once.
ERROR = 2.0**-7


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a result is wrong."""
    options = read_options(argv)
    rows = [
        measure(name, weight_of(*shape), tokens)
        for name, shape in layer_shapes(read_shape("llama2-7b")).items()
        for tokens in TOKENS
    ]
    columns = list(rows[0])
    table("2:4 against dense, bf16", columns, [list(row.values()) for row in rows])
    if options.json:
        write_json(options.json, {"rows": rows})
    return int(any(row["error"] > ERROR for row in rows))


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    return options.parse_args(argv)


def weight_of(out_features: int, in_features: int) -> torch.Tensor:
    """A random bf16 weight (O, I) of which each group of four keeps its two largest."""
    weight = 0.02 * torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    return weight * Pattern(2, 4).best(weight.abs().float())


def measure(name: str, weight_OI: torch.Tensor, tokens: int) -> dict[str, Any]:
    """Milliseconds of both sides in turn, and the largest error as a share of the largest value."""
    from torch.sparse import to_sparse_semi_structured

    sparse = to_sparse_semi_structured(weight_OI)
    x = torch.randn(tokens, weight_OI.shape[1], device="cuda", dtype=torch.bfloat16)
    expected, found = F.linear(x, weight_OI), F.linear(x, sparse)

    sides = {"dense": lambda: F.linear(x, weight_OI), "2:4": lambda: F.linear(x, sparse)}
    timings = interleave(sides, ROUNDS, weight_OI.device, warmup=2, calls=CALLS)
    return {
        "linear": f"{name} {weight_OI.shape[0]} x {weight_OI.shape[1]}",
        "tokens": tokens,
        "dense ms": timings.median("dense") * 1e3,
        "2:4 ms": timings.median("2:4") * 1e3,
        "speed-up": timings.ratio("dense", "2:4")["median"],
        "error": float((found - expected).abs().max() / expected.abs().max()),
    }


if __name__ == "__main__":
    sys.exit(main())
