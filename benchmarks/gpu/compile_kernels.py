"""Compile the Triton kernels that a lease and a learning run ask for, on a machine without a GPU.

``TRITON_CACHE_DIR=/tmp/triton-cache python -m benchmarks.gpu.compile_kernels --capability 90``

The kernels go through the call sites of the product and through Triton's own binder; only the
launch is left out. So the cache holds the entries that the same calls look for on a GPU, as long as
Python, Triton and the kernels' sources are the same on both machines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import optimizers
from benchmarks.gpu.learning_kernels import (
    KEY,
    Shape,
    check,
    empty,
    empty_weight,
    learn,
    runs,
    shapes_of,
    site_of,
    update,
)
from benchmarks.gpu.lease_parts import BY_NAME, MASKS, Situation
from megamask.config import Config, load_config
from megamask.learn.methods import find_method
from megamask.model.fused import launcher
from megamask.model.fused.rotation import rotate
from megamask.model.fused.swiglu import swiglu
from megamask.optim.stochastic_rounding import RoundingOptimizer
from megamask.sparsity.draw import GradientSink, Sample
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.operator import sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.weights.shapes import read_shape

SOFT, HARD = (Sample(KEY, kappa=300.0, tau=0.5, hard=hard) for hard in (False, True))
FP32, BF16 = torch.float32, torch.bfloat16
PARITY_ROWS, PARITY_GROUPS = 256, 96  # of benchmarks/parity.py
TOKENS = 16  # of a micro-batch; no kernel depends on their number
PARITY_LEARNS, PARITY_MODEL = "categorical/2:4", "toy"
MODELS = ("llama2-7b", "smollm2-135m")


class _Driver:
    """Answers what Triton's binder asks of a driver; there is no device."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """The first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The device to compile for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors lie."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """PyTorch's module of the device."""
        return torch.cuda


def main(argv: list[str] | None = None) -> int:
    """Compile; print the number of kernels and the seconds."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--capability", type=int, default=90, help="90 for an H100 or H200")
    options.add_argument("--masks", nargs="+", default=MASKS, metavar="DISTRIBUTION/N:M")
    options.add_argument("--models", nargs="*", default=MODELS, metavar="SHAPE")
    options.add_argument(
        "--settings", nargs="*", default=[], metavar="KEY=VALUE", help="of every learning run"
    )
    chosen = options.parse_args(argv)
    begin, count = time.monotonic(), 0
    with compiling(chosen.capability) as compiled:
        all_updates()
        print(f"updates: {len(compiled)} kernels", flush=True)
        count = len(compiled)
        for masks in chosen.masks:
            parity(masks)
            for config in runs(masks, chosen.settings):
                run(config, chosen.models)
            print(f"{masks}: {len(compiled) - count} kernels", flush=True)
            count = len(compiled)
        for model in chosen.models:
            frozen_parts(model)
        print(f"frozen models: {len(compiled) - count} kernels", flush=True)
        count = len(compiled)
    print(f"{count} kernels for sm_{chosen.capability} in {time.monotonic() - begin:.0f} s")
    return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Make launches of ``triton_host`` and of the fused kernels of the frozen model compile for
    ``capability`` and do nothing else.

    Yields:
        The compiled kernels, each once.
    """
    compiled: list[Any] = []
    seen: set[int] = set()

    def warm_up(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        made = kernel.warmup(*arguments, grid=(programs,), **constants)
        if id(made) not in seen:
            seen.add(id(made))
            compiled.append(made)

    def sample(
        kernel: Any, programs: int, on: torch.Tensor, *arguments: Any, **constants: Any
    ) -> None:
        warm_up(kernel, programs, *arguments, **constants, **triton_host.OPTIONS)

    def fused(
        kernel: Any, programs: int, warps: int, on: Any, *arguments: Any, **constants: Any
    ) -> None:
        warm_up(kernel, programs, *arguments, **constants, **launcher.options(warps))

    before: Any = driver.__dict__.get("_active")
    driver.set_active(_Driver(capability))
    try:
        with (
            patch.object(triton_host, "launch", sample),
            patch.object(launcher, "launch", fused),
            patch.object(launcher, "takes", lambda tensor: True),
            patch.object(RoundingOptimizer, "by_numba", RoundingOptimizer.by_triton),
        ):
            yield compiled
    finally:
        driver.__dict__["_active"] = before


def parity(masks: str) -> None:
    """The kernels of ``benchmarks.parity``: the sample itself, hard masks, statistics, and the
    learning steps of a small model, whose hard masks are taken too.
    """
    method, _, pattern = masks.partition("/")
    shape = Shape(PARITY_ROWS, PARITY_GROUPS * Pattern.parse(pattern).m)
    for dtype in ("fp32", "bf16"):
        words = [f"learn.method={method}", f"pattern={pattern}", f"dtype={dtype}"]
        config = load_config(None, [*words, f"learn.state.logits={dtype}"])
        sample(config, shape, SOFT, with_gradient=True)
        if dtype == "fp32":
            sample(config, shape, HARD, with_gradient=False)
    if masks == PARITY_LEARNS:
        words = ["dtype=fp32", f"learn.method={method}", f"pattern={pattern}"]
        for one in shapes_of(PARITY_MODEL):
            learn(load_config(None, words), one)


def sample(config: Config, shape: Shape, draw: Sample, with_gradient: bool) -> None:
    """One draw without statistics, its gradient at the logits, and the hard mask."""
    method = find_method(config.learn.method)
    site, weight = site_of(config, shape, method), empty_weight(config, shape)
    logits = empty(site, shape, weight.dtype)
    sampler = sampler_for("triton", method.distribution)
    sampler.forward(logits, weight, site, draw)
    if with_gradient:
        sampler.backward(weight, logits, weight, site, draw, GradientSink(norm_coef=1e-3))
    sampler.mask_statistics(logits, site, draw.kappa)


def run(config: Config, models: list[str]) -> None:
    """The kernels of a learning run: of the check before it, and of every masked linear."""
    check(config)
    for model in models:
        for shape in shapes_of(model):
            learn(config, shape)


def frozen_parts(model: str) -> None:
    """The rotation of queries and of keys and SwiGLU, forward and backward."""
    arch = read_shape(model)
    angles = torch.empty(TOKENS, 1, 1, arch.head_dim)
    for heads in (arch.heads, arch.kv_heads):
        t = torch.empty(TOKENS, 1, heads, arch.head_dim, dtype=BF16, requires_grad=True)
        rotate(t, angles).backward(t)
    both = torch.empty(TOKENS, 1, 2 * arch.ffn, dtype=BF16, requires_grad=True)
    swiglu(both).backward(both[..., : arch.ffn])


def all_updates() -> None:
    """The kernels of ``benchmarks.optimizers`` as a lease calls it."""
    command = BY_NAME["optimizers"].command(Situation("cuda", Path()))
    assert command is not None
    options = optimizers.read_options(command[command.index("-m") + 2 :])
    for settings in optimizers.SIDES.values():
        config = optimizers.config_of(torch.device("cpu"), settings)
        update(config, Shape(options.rows, options.columns))


if __name__ == "__main__":
    sys.exit(main())
