"""2:4 inference at LLaMA-2-7B shapes: dense matmul against PyTorch's semi-structured tensors
(cuSPARSELt), bf16 and fp8, in milliseconds and error, from 16 to 16,384 tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.common import interleave, table
from benchmarks.sampling import layer_shapes
from megamask.sparsity.pattern import Pattern
from megamask.storage import write_json
from megamask.user_paths import path_argument
from megamask.weights.shapes import read_shape

TOKENS = {"cuda": (16, 64, 256, 1024, 4096, 16384), "cpu": (16, 64)}
MODEL = {"cuda": "llama2-7b", "cpu": "toy"}
CALLS = {"cuda": 10, "cpu": 1}  # that one time covers
ROUNDS = {"cuda": 7, "cpu": 1}
CHECKED = 256  # tokens whose results are compared
# Of the largest result. Products in bf16 are added in fp32 and rounded once. The tensor cores of an
# H100 keep about 14 bits of a sum of fp8 products.
ERRORS = {"bf16": 2.0**-7, "fp8": 2.0**-5}
LARGEST = 448.0  # of fp8 e4m3
Side = Callable[[], torch.Tensor]


class Case(NamedTuple):
    """A product of T tokens and a weight: the sides by name, and the result in fp32, (T, O)."""

    sides: dict[str, Side]
    expected: torch.Tensor


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a result is wrong."""
    options = read_options(argv)
    device = torch.device(options.device)
    rows, problems = [], dict[str, str]()
    for name, shape in layer_shapes(read_shape(MODEL[device.type])).items():
        weight = weight_of(*shape, device)
        for dtype, case_of in (("bf16", in_bf16), ("fp8", in_fp8)):
            for tokens in TOKENS[device.type]:
                x = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)
                case = case_of(x, weight)
                sides = those_that_run(case.sides, dtype, problems)
                row = {"linear": f"{name} {shape[0]} x {shape[1]}", "dtype": dtype}
                rows.append({**row, "tokens": tokens, **measure(sides, case.expected, device)})
    columns = list(rows[0])
    table("2:4 against dense", columns, [list(row.values()) for row in rows])
    for side, problem in problems.items():
        print(f"{side}: not possible here: {problem}")
    if options.json:
        write_json(options.json, {"rows": rows, "not possible": problems})
    return int(any(is_wrong(row) for row in rows))


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--json", type=path_argument)
    return options.parse_args(argv)


def weight_of(out_features: int, in_features: int, device: torch.device) -> torch.Tensor:
    """A random bf16 weight (O, I) of which each group of four keeps its two largest."""
    weight = 0.02 * torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16)
    return weight * Pattern(2, 4).best(weight.abs().float())


def in_bf16(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> Case:
    """Both operands in bf16."""
    from torch.sparse import to_sparse_semi_structured

    packed: list[torch.Tensor] = []

    def sparse() -> torch.Tensor:
        if not packed:  # within the call, so that software without it is told as such
            packed.append(to_sparse_semi_structured(weight_OI))
        return F.linear(x_TI, packed[0])

    expected = x_TI[:CHECKED].float() @ weight_OI.float().t()
    return Case({"dense": lambda: F.linear(x_TI, weight_OI), "2:4": sparse}, expected)


def in_fp8(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> Case:
    """Both operands in e4m3 with one scale each, results in bf16."""
    from torch.sparse import to_sparse_semi_structured

    (x8, x_scale), (w8, w_scale) = in_e4m3(x_TI), in_e4m3(weight_OI)
    multiply: Any = torch._scaled_mm
    packed: list[torch.Tensor] = []

    def dense() -> torch.Tensor:
        product: torch.Tensor = multiply(x8, w8.t(), x_scale, w_scale, out_dtype=torch.bfloat16)
        return product

    def sparse() -> torch.Tensor:
        if not packed:
            packed.append(to_sparse_semi_structured(w8))
        product: torch.Tensor = multiply(
            packed[0], x8.t(), w_scale, x_scale, out_dtype=torch.bfloat16
        )
        return product.t()

    expected = (x8[:CHECKED].float() * x_scale) @ (w8.float() * w_scale).t()
    return Case({"dense": dense, "2:4": sparse}, expected)


def in_e4m3(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8, scale): the values are about their product."""
    scale = values.abs().max().float() / LARGEST
    return (values.float() / scale).to(torch.float8_e4m3fn), scale


def those_that_run(sides: dict[str, Side], dtype: str, problems: dict[str, str]) -> dict[str, Side]:
    """The sides that this machine's software has; what another says goes to ``problems``."""
    found = {}
    for name, side in sides.items():
        try:
            side()
        except Exception as error:  # whatever a library that lacks it raises
            problems[f"{name}, {dtype}"] = (str(error).splitlines() or ["no message"])[0][:200]
        else:
            found[name] = side
    return found


def measure(sides: dict[str, Side], expected: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Milliseconds of the sides in turn, and their largest errors as shares of the largest value;
    None of a side that does not run.
    """
    kind = device.type
    timings = interleave(sides, ROUNDS[kind], device, warmup=2, calls=CALLS[kind])
    row: dict[str, Any] = {}
    for side in ("dense", "2:4"):
        row[f"{side} ms"] = timings.median(side) * 1e3 if side in sides else None
    row["speed-up"] = timings.ratio("dense", "2:4")["median"] if len(sides) == 2 else None
    for side in ("dense", "2:4"):
        row[f"{side} error"] = error_of(sides[side](), expected) if side in sides else None
    return row


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    apart = (found[: len(expected)].float() - expected).abs().max()
    return float(apart / expected.abs().max())


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a side of the row is further off than its roundings explain."""
    errors = [row["dense error"], row["2:4 error"]]
    return any(error is not None and not error <= ERRORS[row["dtype"]] for error in errors)


if __name__ == "__main__":
    sys.exit(main())
