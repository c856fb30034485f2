"""The sampling operator alone: every backend of the device, per layer shape, against each other and the measured copy bandwidth.

python -m benchmarks.sampling --shapes smollm2-135m --json sampling.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any, get_args

import torch

from benchmarks.common import Timings, copy_bandwidth, interleave, parser, report, table
from benchmarks.lab import LOGIT_STD
from megamask.config.tree import SamplingSection
from megamask.errors import ConfigError
from megamask.parallel.mesh import choose_device
from megamask.sparsity.backends import backend_by_name, choose_backend
from megamask.sparsity.draw import DISTRIBUTIONS, Draw, Placement, Site
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.philox import NoiseKey
from megamask.weights.architecture import Architecture
from megamask.weights.shapes import SHAPES, read_shape

OPERATIONS = ("forward", "backward", "survey")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN = "torch"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = read_options(argv)
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    backends = available_backends(device, options.distribution)
    copy = copy_bandwidth(device, options.copy_mib << 20)
    rows = []
    for name, (out_features, in_features) in shapes(options).items():
        layer = Layer(out_features, in_features, options, device)
        timings = layer.measure(backends, options.rounds)
        rows += [layer.figures(name, backend, timings, copy) for backend in backends]
    show(rows, copy, options)
    report("sampling", options, {"copy_gb_per_second": copy / 1e9, "rows": rows}, device)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.add_argument("--shapes", choices=SHAPES, default="smollm2-135m", help="the linears of one layer of this model")
    options.add_argument("--only", nargs="*", metavar="LINEAR", help="of qkv, proj, fc1, fc2: these")
    options.add_argument("--pattern", default="2:4")
    options.add_argument("--distribution", choices=DISTRIBUTIONS, default="categorical")
    options.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of weight and gradient")
    options.add_argument("--hard", action="store_true", help="one-hot masks")
    options.add_argument("--copy-mib", type=int, default=256, help="size of the buffer that is copied for the bandwidth")
    return options.parse_args(argv)


def available_backends(device: torch.device, distribution: str) -> dict[str, ModuleType]:
    """Every backend that megamask can choose here, by name."""
    found = {}
    for name in get_args(SamplingSection.model_fields["backend"].annotation):
        try:
            found[name] = backend_by_name(choose_backend(name, device, distribution), distribution)
        except ConfigError:
            continue
    del found["auto"]
    return found


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """(O, I) of the fused Megatron linears of one layer."""
    return {name: shape for name, shape in layer_shapes(read_shape(options.shapes)).items() if not options.only or name in options.only}


def layer_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """(O, I) by Megatron's short names."""
    heads = arch.heads * arch.head_dim
    qkv = heads + 2 * arch.kv_heads * arch.head_dim
    return {"qkv": (qkv, arch.hidden), "proj": (arch.hidden, heads), "fc1": (2 * arch.ffn, arch.hidden), "fc2": (arch.hidden, arch.ffn)}


class Layer:
    """One masked weight with random contents."""

    def __init__(self, out_features: int, in_features: int, options: argparse.Namespace, device: torch.device) -> None:
        pattern, dtype = Pattern.parse(options.pattern), DTYPES[options.dtype]
        groups = in_features // pattern.m
        self.groups, self.device = out_features * groups, device
        self.site = Site(pattern, Placement.whole(out_features, groups), options.distribution)
        self.draw = Draw(NoiseKey(1, 2, 3, 4), kappa=300.0, tau=1.0, hard=options.hard, norm_coef=1e-5)
        torch.manual_seed(0)
        self.logits = LOGIT_STD * torch.randn(out_features, self.site.logits_per_group, groups, device=device)
        self.weight = (0.02 * torch.randn(out_features, in_features, device=device)).to(dtype)
        self.grad = (1e-3 * torch.randn(out_features, in_features, device=device)).to(dtype)

    def work(self, backend: ModuleType, operation: str) -> Callable[[], Any]:
        """A call of the operator."""
        if operation == "forward":
            return partial(backend.forward, self.logits, self.weight, self.site, self.draw)
        if operation == "backward":
            return partial(backend.backward, self.grad, self.logits, self.weight, self.site, self.draw)
        return partial(backend.survey, self.logits, self.site, self.draw.kappa)

    def traffic(self, operation: str) -> int:
        """Bytes that a pass must read and write at least, caches apart: every operand once."""
        logits, weight = self.logits.nbytes, self.weight.nbytes
        return {
            "forward": logits + 2 * weight,
            "backward": 2 * logits + 2 * weight,
            "survey": logits + self.groups * self.site.winner_dtype.itemsize,
        }[operation]

    def measure(self, backends: dict[str, ModuleType], rounds: int) -> Timings:
        """Times of every backend and operation, interleaved; sides are named ``backend operation``."""
        sides = {f"{name} {operation}": self.work(backends[name], operation) for name, operation in product(backends, OPERATIONS)}
        return interleave(sides, rounds, self.device)

    def figures(self, name: str, backend: str, timings: Timings, copy: float) -> dict[str, Any]:
        """Nanoseconds a group, GB/s and share of the copy bandwidth per operation, and the speed-up over plain PyTorch."""
        row: dict[str, Any] = {"linear": name, "shape": list(self.weight.shape), "backend": backend}
        for operation in OPERATIONS:
            seconds = timings.median(f"{backend} {operation}")
            rate = self.traffic(operation) / seconds
            row[operation] = {"ns_per_group": seconds / self.groups * 1e9, "gb_per_second": rate / 1e9, "share_of_copy": rate / copy}
        both = Timings({one: self._forward_backward(one, timings) for one in (backend, PLAIN)})
        row["speed_up"] = both.ratio(PLAIN, backend)["median"]
        return row

    @staticmethod
    def _forward_backward(backend: str, timings: Timings) -> list[float]:
        parts = (timings.seconds[f"{backend} {operation}"] for operation in ("forward", "backward"))
        return [sum(pair) for pair in zip(*parts, strict=True)]


def show(rows: list[dict[str, Any]], copy: float, options: argparse.Namespace) -> None:
    """Print the tables."""
    print(f"\ncopy bandwidth, read plus written: {copy / 1e9:.1f} GB/s")
    title = f"{options.shapes}, {options.pattern} {options.distribution}, {options.dtype} weights, fp32 logits"
    columns = ["linear", "backend", "ns a group: forward", "backward", "survey", f"forward + backward against {PLAIN}"]
    nanoseconds = [
        [
            f"{row['linear']} {row['shape'][0]} x {row['shape'][1]}",
            row["backend"],
            *(row[one]["ns_per_group"] for one in OPERATIONS),
            row["speed_up"],
        ]
        for row in rows
    ]
    table(title, columns, nanoseconds)
    columns = ["linear", "backend", *(f"{operation}, GB/s" for operation in OPERATIONS), *(f"{one}, share of copy" for one in OPERATIONS)]
    rates = [
        [row["linear"], row["backend"], *(row[one][key] for key in ("gb_per_second", "share_of_copy") for one in OPERATIONS)]
        for row in rows
    ]
    table("memory traffic", columns, rates)


if __name__ == "__main__":
    sys.exit(main())
