"""Bytes of state per prunable weight, counted from the tensors that a learner holds after a step.

python -m benchmarks.memory --model smollm2-135m --json memory.json
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import parser, report, table
from benchmarks.lab import Lab, add_model_options, open_lab
from megamask.learn.method import (
    GRADIENTS,
    HARD_CODES,
    LOGITS,
    MOMENTS,
    STEP_GRADIENTS,
    WEIGHTS,
)
from megamask.learn.metrics.mask_stats import MaskStatistics

KEPT = "masked weights kept for the backward pass"
OTHER = "all other tensors"
# Other classes of tensors, from torch.compile and 8-bit optimizers, have no storage of their own.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def main(argv: list[str] | None = None) -> int:
    """Count the bytes of each kind of state, print and write them."""
    options = read_options(argv)
    with open_lab(options, steps=2) as lab:
        kept = kept_for_backward(lab)
        mask_statistics = MaskStatistics(
            lab.masked_model, lab.mesh, lab.config.learn.state.track_flips
        )
        assert lab.learner is not None
        mask_statistics(lab.learner.step(1, lab.plan).first_draw)
        state = count(lab, mask_statistics)
        weights = sum(linear.weight.numel() for linear in lab.masked_model.linears.values())
        on_device = torch.cuda.memory_allocated() if lab.mesh.device.type == "cuda" else None
        device = lab.mesh.device
    parts = {**state, KEPT: kept}
    per_weight = {part: size / weights for part, size in parts.items() if part != OTHER}
    model = options.hf.name if options.hf else options.model
    rows = [[part, size / 2**20, per_weight.get(part)] for part, size in parts.items()]
    total = sum(per_weight.values())
    table(
        f"{model}: {weights / 1e6:.1f} M prunable weights",
        ["what", "MiB", "bytes a weight"],
        [*rows, ["sum of the state", None, total]],
    )
    if on_device is not None:
        counted = sum(state.values())
        print(
            f"\nheld by the CUDA allocator: {on_device / 2**20:,.0f} MiB; "
            f"counted: {counted / 2**20:,.0f} MiB"
        )
    figures = {
        "weights": weights,
        "bytes": parts,
        "bytes_per_weight": per_weight,
        "sum_per_weight": total,
        "cuda_allocated": on_device,
    }
    report("memory", options, figures, device)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_model_options(options)
    return options.parse_args(argv)


def count(lab: Lab, mask_statistics: MaskStatistics) -> dict[str, int]:
    """Kind of state -> bytes of its storages.

    A storage counts once, for the first kind that holds it.
    """
    assert lab.learner is not None
    linears, logits = lab.masked_model.linears.values(), lab.masked_model.mask_logits
    kinds: dict[str, Iterable[Any]] = {
        WEIGHTS: [linear.weight for linear in linears],
        LOGITS: logits,
        GRADIENTS: [
            tensor
            for parameter in logits
            for tensor in (getattr(parameter, "main_grad", None), parameter.grad)
        ],
        MOMENTS: lab.learner.optimizer.state_tensors(),
        STEP_GRADIENTS: lab.learner.step_draws.buffers if lab.learner.step_draws else [],
        HARD_CODES: [mask_statistics.initial, mask_statistics.latest],
        OTHER: live_tensors(lab.mesh.device),
    }
    seen: set[int] = set()
    return {
        kind: sum(new_bytes(tensor, seen) for tensor in tensors if tensor is not None)
        for kind, tensors in kinds.items()
    }


def live_tensors(device: torch.device) -> list[torch.Tensor]:
    """All tensors of the device that Python's garbage collector knows.

    Among them are embeddings, norms, rotary tables and buffers that have no kind of their own.
    """
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at an object may deprecate it
        return [
            tensor
            for tensor in gc.get_objects()
            if type(tensor) in _PLAIN and tensor.device.type == device.type
        ]


def new_bytes(tensor: torch.Tensor, seen: set[int]) -> int:
    """Bytes of a tensor's storage; 0 for a storage in ``seen``, which then gets the storage."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()


def kept_for_backward(lab: Lab) -> int:
    """Bytes of masked weights that autograd saves in the forward pass of the first micro-batch."""
    assert lab.learner is not None
    linear = next(iter(lab.masked_model.linears.values()))
    backend = linear.sampler
    made: dict[int, Any] = {}  # holds the storages, so that no other tensor gets their address
    saved: dict[int, int] = {}
    forward = backend.forward

    def recording_forward(*args: Any, **settings: Any) -> Any:
        sampled = forward(*args, **settings)
        if len(made) < len(lab.masked_model.linears):
            made[sampled.masked.untyped_storage().data_ptr()] = sampled.masked.untyped_storage()
        return sampled

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in made:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack:
        stack.enter_context(patch.object(backend, "forward", recording_forward))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        lab.learner.step(0, lab.plan)
    return sum(saved.values())


if __name__ == "__main__":
    sys.exit(main())
