"""The sampling operator alone: every backend of the device, per layer shape and kind of mask,
against each other and the measured copy
bandwidth.

python -m benchmarks.sampling --shapes smollm2-135m --json sampling.json
python -m benchmarks.sampling --only fc2 --masks subset/2:4 subset/4:8 --backends numba --threads 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.common import Timings, copy_bandwidth, interleave, parser, report, table
from benchmarks.eager import EagerSampling
from benchmarks.lab import LOGIT_STD
from megamask.config.learn_tree import SamplingSection
from megamask.errors import ConfigError
from megamask.parallel.mesh import choose_device
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.draw import GradientSink, Sample, Sampler, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.weights.architecture import Architecture
from megamask.weights.shapes import SHAPES, read_shape

CALLS_ON_CUDA = 10  # that one time covers
OPERATIONS = ("forward", "backward", "mask statistics")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN, EAGER = "torch", "eager"
MASKS = ["categorical/2:4", "subset/2:4", "subset/4:8", "subset/8:16"]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = read_options(argv)
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    copy = copy_bandwidth(device, options.copy_mib << 20)
    rows = []
    for name, (out_features, in_features) in shapes(options).items():
        layers = {
            masks: Layer(out_features, in_features, masks, options, device)
            for masks in options.masks
        }
        timings = measure(layers, options.rounds, device, options.eager)
        first = options.masks[0]
        rows += [
            layer.figures(name, backend, timings, copy, first)
            for layer in layers.values()
            for backend in layer.backends
        ]
    show(rows, copy, options)
    report("sampling", options, {"copy_gb_per_second": copy / 1e9, "rows": rows}, device)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.add_argument(
        "--shapes",
        choices=SHAPES,
        default="smollm2-135m",
        help="the linears of one layer of this model",
    )
    options.add_argument(
        "--only", nargs="*", metavar="LINEAR", help="of qkv, proj, fc1, fc2: these"
    )
    options.add_argument(
        "--masks",
        nargs="+",
        metavar="DISTRIBUTION/N:M",
        default=MASKS,
        help=f"default: {' '.join(MASKS)}",
    )
    options.add_argument("--backends", nargs="+", help="of those that can run here: these")
    options.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="of weight and gradient"
    )
    options.add_argument("--hard", action="store_true", help="one-hot masks")
    options.add_argument(
        "--noise", type=float, default=1.0, help="factor on the Gumbel noise; 0 draws nothing"
    )
    options.add_argument(
        "--eager",
        action="store_true",
        help="also time the sampling of the paper's method in plain PyTorch (benchmarks/eager.py)",
    )
    options.add_argument(
        "--copy-mib",
        type=int,
        default=256,
        help="size of the buffer that is copied for the bandwidth",
    )
    return options.parse_args(argv)


def available_backends(device: torch.device, distribution: Distribution) -> dict[str, Sampler]:
    """Every backend that megamask can choose here, by name."""
    found = {}
    for name in get_args(SamplingSection.model_fields["backend"].annotation):
        try:
            found[name] = sampler_for(choose_backend(name, device, distribution), distribution)
        except ConfigError:
            continue
    del found["auto"]
    return found


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """(O, I) of the fused Megatron linears of one layer."""
    return {
        name: shape
        for name, shape in layer_shapes(read_shape(options.shapes)).items()
        if not options.only or name in options.only
    }


def layer_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """(O, I) by Megatron's short names."""
    heads = arch.heads * arch.head_dim
    qkv = heads + 2 * arch.kv_heads * arch.head_dim
    return {
        "qkv": (qkv, arch.hidden),
        "proj": (arch.hidden, heads),
        "fc1": (2 * arch.ffn, arch.hidden),
        "fc2": (arch.hidden, arch.ffn),
    }


class Layer:
    """One masked weight with random contents, and the backends that can sample its masks."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        masks: str,
        options: argparse.Namespace,
        device: torch.device,
    ) -> None:
        name, _, shape = masks.partition("/")
        distribution = DISTRIBUTIONS[name]
        pattern, dtype = Pattern.parse(shape), DTYPES[options.dtype]
        groups = in_features // pattern.m
        self.masks, self.groups = masks, out_features * groups
        self.site = Site(pattern, Placement.whole(out_features, groups), distribution)
        found = available_backends(device, distribution)
        self.backends = {
            name: module
            for name, module in found.items()
            if not options.backends or name in options.backends
        }
        key, hard, noise = NoiseKey(1, 2, 3, 4), options.hard, options.noise
        self.sample = Sample(key, kappa=300.0, tau=1.0, hard=hard, noise=noise)
        torch.manual_seed(0)
        self.logits = LOGIT_STD * torch.randn(
            out_features, self.site.logits_per_group, groups, device=device
        )
        self.weight = (0.02 * torch.randn(out_features, in_features, device=device)).to(dtype)
        self.grad = (1e-3 * torch.randn(out_features, in_features, device=device)).to(dtype)

    def work(self, backend: Sampler, operation: str) -> Callable[[], Any]:
        """A call of the operator."""
        if operation == "forward":
            return partial(backend.forward, self.logits, self.weight, self.site, self.sample)
        if operation == "backward":
            return partial(
                backend.backward,
                self.grad,
                self.logits,
                self.weight,
                self.site,
                self.sample,
                GradientSink(norm_coef=1e-5),
            )
        return partial(backend.mask_statistics, self.logits, self.site, self.sample.kappa)

    def traffic(self, operation: str) -> int:
        """Bytes that a pass must read and write at least, caches apart: every operand once."""
        logits, weight = self.logits.nbytes, self.weight.nbytes
        return {
            "forward": logits + 2 * weight,
            "backward": 2 * logits + 2 * weight,
            "mask statistics": logits + self.groups * self.site.code_dtype.itemsize,
        }[operation]

    def sides(self) -> dict[str, Callable[[], Any]]:
        """Every backend and operation, as ``masks backend operation``."""
        return {
            f"{self.masks} {name} {one}": self.work(module, one)
            for name, module in self.backends.items()
            for one in OPERATIONS
        }

    def figures(
        self, name: str, backend: str, timings: Timings, copy: float, first: str
    ) -> dict[str, Any]:
        """Nanoseconds a weight, GB/s, share of the copy bandwidth; forward + backward against plain
        PyTorch and against ``first``.
        """
        row: dict[str, Any] = {
            "linear": name,
            "shape": list(self.weight.shape),
            "masks": self.masks,
            "backend": backend,
        }
        for operation in OPERATIONS:
            seconds = timings.median(f"{self.masks} {backend} {operation}")
            rate = self.traffic(operation) / seconds
            nanoseconds = {
                "ns_per_weight": seconds / self.weight.numel() * 1e9,
                "ns_per_group": seconds / self.groups * 1e9,
            }
            row[operation] = {
                **nanoseconds,
                "gb_per_second": rate / 1e9,
                "share_of_copy": rate / copy,
            }
        here = f"{self.masks} {backend}"
        row["speed_up"] = ratio(timings, f"{self.masks} {PLAIN}", here)
        row["against_first"] = ratio(timings, here, f"{first} {backend}")
        row["eager_over_this"] = ratio(timings, f"{self.masks} {EAGER}", here)
        return row


def measure(
    layers: dict[str, Layer], rounds: int, device: torch.device, with_eager: bool = False
) -> Timings:
    """Times of every kind of masks, backend and operation, interleaved; and of forward and backward
    together, as ``masks backend``.
    """
    sides = {side: work for layer in layers.values() for side, work in layer.sides().items()}
    if with_eager:
        sides |= {
            f"{masks} {EAGER}": EagerSampling(layer.weight, layer.grad, layer.site.pattern)
            for masks, layer in layers.items()
            if masks.startswith("categorical/")
        }
    calls = CALLS_ON_CUDA if device.type == "cuda" else 1
    timings = interleave(sides, rounds, device, calls=calls)
    both = {}
    for side in (
        f"{masks} {backend}" for masks, layer in layers.items() for backend in layer.backends
    ):
        parts = (timings.seconds[f"{side} {operation}"] for operation in ("forward", "backward"))
        both[side] = [sum(pair) for pair in zip(*parts, strict=True)]
    return Timings({**timings.seconds, **both})


def ratio(timings: Timings, side: str, baseline: str) -> float | None:
    """The median of the pairs' ratios; None where one was not measured."""
    return (
        timings.ratio(side, baseline)["median"]
        if {side, baseline} <= timings.seconds.keys()
        else None
    )


def show(rows: list[dict[str, Any]], copy: float, options: argparse.Namespace) -> None:
    """Print the tables."""
    print(f"\ncopy bandwidth, read plus written: {copy / 1e9:.1f} GB/s")
    title = f"{options.shapes}, {options.dtype} weights, fp32 logits, noise {options.noise:g}"
    against = [f"forward + backward against {one}" for one in (PLAIN, options.masks[0])]
    against += ["eager / this"] if options.eager else []
    columns = [
        "linear",
        "masks",
        "backend",
        *(f"{operation}, ns a weight" for operation in OPERATIONS),
        *against,
    ]
    nanoseconds = [
        [
            f"{row['linear']} {row['shape'][0]} x {row['shape'][1]}",
            row["masks"],
            row["backend"],
            *(row[one]["ns_per_weight"] for one in OPERATIONS),
            row["speed_up"],
            row["against_first"],
            *([row["eager_over_this"]] if options.eager else []),
        ]
        for row in rows
    ]
    table(title, columns, nanoseconds)
    columns = [
        "linear",
        "masks",
        "backend",
        *(f"{one}, GB/s" for one in OPERATIONS),
        *(f"{one}, share of copy" for one in OPERATIONS),
    ]
    rates = [
        [
            row["linear"],
            row["masks"],
            row["backend"],
            *(row[one][key] for key in ("gb_per_second", "share_of_copy") for one in OPERATIONS),
        ]
        for row in rows
    ]
    table("memory traffic", columns, rates)


if __name__ == "__main__":
    sys.exit(main())
