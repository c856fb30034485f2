"""The update of the mask logits: nanoseconds a logit of each optimizer, against PyTorch's fused
AdamW after a clipping pass of its own.

python -m benchmarks.optimizers --threads 1 --json optimizers.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleave, parser, report, table
from megamask.config import Config
from megamask.config.load import load_config
from megamask.learn.method import WIDTH
from megamask.optim.optimizers import build_optimizer, find_rule
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Site
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

BASELINE = "AdamW after a clipping pass"
# Settings of ``learn``.
SIDES: dict[str, dict[str, str]] = {
    "adamw": {},
    "adamw, bf16 logits": {"state.logits": "bf16"},
    "adamw, bf16 logits and gradients": {"state.logits": "bf16", "state.grads": "bf16"},
    "lion, fp32 logits": {"optimizer.kind": "lion"},
    "lion, bf16 logits": {"optimizer.kind": "lion", "state.logits": "bf16"},
    "lion8bit, bf16 logits": {"optimizer.kind": "lion8bit", "state.logits": "bf16"},
    "lion8bit, bf16 logits and gradients": {
        "optimizer.kind": "lion8bit",
        "state.logits": "bf16",
        "state.grads": "bf16",
    },
}
WITH_TORCHAO = {
    "adamw8bit, bf16 logits": {"optimizer.kind": "adamw8bit", "state.logits": "bf16"},
}


class Layer:
    """Stands for a masked linear: logits (O, C, G) with a gradient, and their place."""

    def __init__(
        self,
        number: int,
        rows: int,
        groups: int,
        pattern: Pattern,
        config: Config,
        device: torch.device,
    ) -> None:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        shape = (rows, pattern.num_candidates, groups)
        self.weight = torch.empty(0, device=device)
        self.mask_logits = torch.nn.Parameter(
            0.01 * torch.randn(shape, device=device, dtype=dtypes[config.learn.state.logits])
        )
        gradient = 1e-3 * torch.randn(shape, device=device, dtype=dtypes[config.learn.state.grads])
        self.mask_logits.main_grad = gradient  # type: ignore[attr-defined]
        self.parameter_id, self.site = (
            number,
            Site(pattern, Placement.whole(rows, groups), CATEGORICAL),
        )


def main(argv: list[str] | None = None) -> int:
    """Time, print, write."""
    options = read_options(argv)
    device = torch.device(
        "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    )
    torch.set_num_threads(options.threads or torch.get_num_threads())
    sides = {**SIDES, **(WITH_TORCHAO if options.with_adamw8bit else {})}
    works = {
        BASELINE: clipping_first(options, device),
        **{side: update(options, device, settings) for side, settings in sides.items()},
    }
    timings = interleave(works, options.rounds, device, warmup=2)
    logits = options.layers * options.rows * options.columns // 4 * 6
    best = {side: min(timings.seconds[side]) / logits for side in works}
    # the clipping pass reads and writes the gradient, AdamW then reads it
    moved = {BASELINE: bytes_moved(config_of(device, {})) + 8}
    moved |= {side: bytes_moved(config_of(device, settings)) for side, settings in sides.items()}
    moved["adamw"] += 4  # PyTorch writes the scaled gradient back
    rows = [
        [side, 1e9 * best[side], moved[side] / best[side] / 1e9, best[BASELINE] / best[side]]
        for side in works
    ]
    columns = ["optimizer", "ns a logit", "GB/s", "times faster"]
    table(
        f"{logits / 1e6:.1f} M logits, 2:4, the fastest of {options.rounds} rounds", columns, rows
    )
    report(
        "optimizers",
        options,
        {
            "logits": logits,
            "seconds": timings.seconds,
            "ns_a_logit": {k: 1e9 * v for k, v in best.items()},
        },
        device,
    )
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, default=768)
    options.add_argument("--columns", type=int, default=576)
    options.add_argument("--layers", type=int, default=20)
    options.add_argument(
        "--with-adamw8bit", action="store_true", help="also torchao's, which compiles for a while"
    )
    return options.parse_args(argv)


def config_of(device: torch.device, settings: dict[str, str]) -> Config:
    """The configuration with these settings of ``learn``."""
    chosen = {"method": "categorical", **settings}
    return load_config(
        None, [f"device={device.type}", *(f"learn.{key}={chosen[key]}" for key in chosen)]
    )


def bytes_moved(config: Config) -> float:
    """Bytes that the update of a logit moves: the gradient is read, logit and moments are read and
    written.
    """
    state, rule = config.learn.state, find_rule(config.learn.optimizer.kind)
    moments = rule.moment_bytes(state.logits, Pattern(2, 4).num_candidates)
    return WIDTH[state.grads] + 2 * (WIDTH[state.logits] + moments)


def build(
    options: argparse.Namespace, device: torch.device, settings: dict[str, str]
) -> tuple[Any, list[Layer]]:
    """An optimizer under these settings of ``learn``, and its layers."""
    config = config_of(device, settings)
    pattern = Pattern(2, 4)
    layers = [
        Layer(number, options.rows, options.columns // 4, pattern, config, device)
        for number in range(options.layers)
    ]
    return build_optimizer(config, layers), layers  # type: ignore[arg-type]


def update(
    options: argparse.Namespace, device: torch.device, settings: dict[str, str]
) -> Callable[[], None]:
    """One step with a clip factor below 1."""
    optimizer, _ = build(options, device, settings)
    factor = torch.tensor(0.999, device=device)
    return lambda: optimizer.step(0, 1e-4, factor)


def clipping_first(options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Multiply the gradients, then PyTorch's AdamW: the two passes that the others are compared
    with.
    """
    _, layers = build(options, device, {})
    adamw = torch.optim.AdamW([layer.mask_logits for layer in layers], fused=True)
    for layer in layers:
        layer.mask_logits.grad = layer.mask_logits.main_grad  # type: ignore[attr-defined]

    def step() -> None:
        grads = [layer.mask_logits.grad for layer in layers]
        torch._foreach_mul_([grad for grad in grads if grad is not None], 0.999)
        adamw.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
