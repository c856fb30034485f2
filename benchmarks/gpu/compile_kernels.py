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
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import optimizers
from benchmarks.gpu.lease_parts import BY_NAME, MASKS, Situation
from benchmarks.sampling import layer_shapes
from megamask.config import load_config
from megamask.learn import kernel_check
from megamask.model.build import DTYPES
from megamask.model.fused import launcher
from megamask.model.fused.rotation import rotate
from megamask.model.fused.swiglu import swiglu
from megamask.optim.optimizers import find_rule
from megamask.optim.stochastic_rounding import RoundingOptimizer
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Site
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.weights.shapes import read_shape

KEY = NoiseKey(1, 2, 3, 4)
SOFT, HARD = (Sample(KEY, kappa=300.0, tau=0.5, hard=hard) for hard in (False, True))
DRAWS = (SOFT, replace(SOFT, noise=0.0))  # learn.sampling.noise=0 has kernels of its own
FP32, BF16 = torch.float32, torch.bfloat16
PARITY_ROWS, PARITY_GROUPS = 256, 96  # of benchmarks/parity.py
TOKENS = 16  # of a micro-batch; no kernel depends on their number
OPTIMIZED = "categorical/2:4"  # by benchmarks/optimizers.py
PARITY_LEARNS, PARITY_MODEL = "categorical/2:4", "toy"
MODELS = ("llama2-7b", "smollm2-135m")
# What the parts of a lease learn with, all of it with soft masks: dtype of the logits, dtype of the
# gradient at the masked weight, and whether the buffer of the gradient is replaced. A draw of its
# own for each micro-batch replaces, then adds; one draw for several replaces alone, and sums its
# gradients in fp32 before. The lean states keep everything in bf16.
USES = (
    *((FP32, BF16, is_first) for is_first in (True, False)),
    (FP32, FP32, True),
    *((BF16, BF16, is_first) for is_first in (True, False)),
)
# The same of the updates of lean states: the optimizer, and dtypes of logits and their gradients.
UPDATES = (("adamw", "bf16", "bf16"), ("lion8bit", "bf16", "bf16"))


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


@dataclass(frozen=True)
class Layer:
    """A masked linear as a kernel sees it.

    Attributes:
        masks: distribution/N:M.
        rows: O.
        columns: I.
        weights: dtype of the weight.
        logits: dtype of the logits.
        gradient: dtype of the gradient at the masked weight.
        blocks: row blocks of the shard: 2 for a fused gate and up.
    """

    masks: str
    rows: int
    columns: int
    weights: torch.dtype = BF16
    logits: torch.dtype = FP32
    gradient: torch.dtype = BF16
    blocks: int = 1


def main(argv: list[str] | None = None) -> int:
    """Compile; print the number of kernels and the seconds."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--capability", type=int, default=90, help="90 for an H100 or H200")
    options.add_argument("--masks", nargs="+", default=MASKS, metavar="DISTRIBUTION/N:M")
    options.add_argument("--models", nargs="*", default=MODELS, metavar="SHAPE")
    chosen = options.parse_args(argv)
    begin, count = time.monotonic(), 0
    with compiling(chosen.capability) as compiled:
        all_updates()
        print(f"updates: {len(compiled)} kernels", flush=True)
        count = len(compiled)
        for masks in chosen.masks:
            parity(masks)
            first_tile(masks)
            for model in chosen.models:
                run(masks, model)
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
        ):
            yield compiled
    finally:
        driver.__dict__["_active"] = before


def parity(masks: str) -> None:
    """The kernels of ``benchmarks.parity``: the sample itself, hard masks, statistics, and the
    learning steps of a small model.
    """
    for dtype in (FP32, BF16):
        columns = PARITY_GROUPS * _pattern(masks).m
        layer = Layer(masks, PARITY_ROWS, columns, dtype, gradient=dtype)
        use(layer, SOFT, GradientSink(norm_coef=1e-3))
    use(Layer(masks, PARITY_ROWS, columns, FP32, gradient=FP32), HARD, None)
    if masks == PARITY_LEARNS:
        for name, (rows, columns) in layer_shapes(read_shape(PARITY_MODEL)).items():
            layer = Layer(masks, rows, columns, FP32, gradient=FP32, blocks=_blocks(name))
            for is_first in (True, False):
                use(layer, SOFT, GradientSink(1e-5, _empty(layer, FP32), is_first), is_first)


def first_tile(masks: str) -> None:
    """The kernels of the check before a learning run (``megamask.learn.kernel_check``)."""
    columns = kernel_check.GROUPS * _pattern(masks).m
    for logits, draw in product((FP32, BF16), DRAWS):
        use(Layer(masks, kernel_check.ROWS, columns, BF16, logits), draw, RETURNED, True)
    for chosen in UPDATES:
        update(Layer(masks, kernel_check.ROWS, columns), *chosen)


def run(masks: str, model: str) -> None:
    """The kernels of a learning run: the draw that replaces the gradient buffer measures too."""
    for name, (rows, columns) in layer_shapes(read_shape(model)).items():
        for (logits, gradient, is_first), draw in product(USES, DRAWS):
            layer = Layer(masks, rows, columns, BF16, logits, gradient, _blocks(name))
            use(layer, draw, GradientSink(1e-5, _empty(layer, logits), is_first), is_first)
        for kind, logits_dtype, gradients in UPDATES:
            layer = Layer(masks, rows, columns, blocks=_blocks(name))
            update(layer, kind, logits_dtype, gradients)


def frozen_parts(model: str) -> None:
    """The rotation of queries and of keys and SwiGLU, forward and backward."""
    arch = read_shape(model)
    angles = torch.empty(TOKENS, 1, 1, arch.head_dim)
    for heads in (arch.heads, arch.kv_heads):
        t = torch.empty(TOKENS, 1, heads, arch.head_dim, dtype=BF16, requires_grad=True)
        rotate(t, angles).backward(t)
    both = torch.empty(TOKENS, 1, 2 * arch.ffn, dtype=BF16, requires_grad=True)
    swiglu(both).backward(both[..., : arch.ffn])


def use(layer: Layer, sample: Sample, sink: GradientSink | None, statistics: bool = False) -> None:
    """One forward pass, one backward pass into ``sink`` and the statistics of a layer."""
    pattern, distribution = _pattern(layer.masks), DISTRIBUTIONS[layer.masks.partition("/")[0]]
    site = Site(pattern, _place(layer), distribution)
    sampler = sampler_for("triton", distribution)
    # Memory that nobody touches is not taken from the machine.
    logits = _empty(layer, layer.logits)
    weight = torch.empty(layer.rows, layer.columns, dtype=layer.weights)
    sampler.forward(logits, weight, site, sample, statistics)
    if sink is not None:
        gradient = torch.empty(layer.rows, layer.columns, dtype=layer.gradient)
        sampler.backward(gradient, logits, weight, site, sample, sink)
    sampler.mask_statistics(logits, site, sample.kappa)


def all_updates() -> None:
    """The kernels of ``benchmarks.optimizers`` as a lease calls it."""
    command = BY_NAME["optimizers"].command(Situation("cuda", Path()))
    assert command is not None
    options = optimizers.read_options(command[command.index("-m") + 2 :])
    layer = Layer(OPTIMIZED, options.rows, options.columns)
    for settings in optimizers.SIDES.values():
        learn = optimizers.config_of(torch.device("cpu"), settings).learn
        if find_rule(learn.optimizer.kind).has_kernels(learn.state.logits):
            update(layer, learn.optimizer.kind, learn.state.logits, learn.state.grads)


def update(layer: Layer, kind: str, logits: str, gradients: str) -> None:
    """The update of a layer's logits by an optimizer with kernels."""
    rule, shape = find_rule(kind), _empty(layer, DTYPES[logits])
    optimizer = rule.build(
        load_config(None, []).learn.optimizer,
        [],
        KEY.seed,
        use_kernels=True,
        logits_dtype=logits,
        epsilon=1e-8,
    )
    assert isinstance(optimizer, RoundingOptimizer)
    optimizer.load_moments(optimizer.moments(), 1)
    tensors = (shape, _empty(layer, DTYPES[gradients]), *optimizer.new_state(shape))
    optimizer.by_triton(_place(layer), tensors, KEY, optimizer.numbers(1e-3), torch.ones(()))


def _place(layer: Layer) -> Placement:
    groups = layer.columns // _pattern(layer.masks).m
    return Placement.shard(layer.rows, groups, axis=0, rank=0, size=1, stride=layer.blocks)


def _empty(layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    """Logits of a layer, or a buffer of their gradient."""
    name, pattern = layer.masks.partition("/")[0], _pattern(layer.masks)
    count = DISTRIBUTIONS[name].logits_per_group(pattern)
    return torch.empty(layer.rows, count, layer.columns // pattern.m, dtype=dtype)


def _pattern(masks: str) -> Pattern:
    return Pattern.parse(masks.partition("/")[2])


def _blocks(name: str) -> int:
    """Row blocks of a shard of this linear."""
    return 2 if name == "fc1" else 1


if __name__ == "__main__":
    sys.exit(main())
