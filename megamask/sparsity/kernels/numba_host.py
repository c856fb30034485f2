"""Sampling of CPU tensors through the fused numba kernels of a distribution, and the threads that
the kernels run on: parts of one layer side by side, or whole layers.

A distribution's ``*_numba`` module exports ``forward``, ``backward``, ``mask_statistics`` and
``shape_arguments(pattern)``, the arguments by which the kernels know the pattern.

Shapes: O out_features, I in_features, G groups per row, L logits a group.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch

from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Sampled, Site
from megamask.sparsity.shard import RowBlock

Item = TypeVar("Item")
Result = TypeVar("Result")

_local = threading.local()


class NumbaSampler:
    """``draw.Sampler`` by fused kernels; fp32 or bf16 logits, weights and gradients."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels

    def forward(
        self,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        statistics: bool = False,
    ) -> Sampled:
        """Sample a mask and apply it to the weight."""
        masked = torch.empty_like(weight, memory_format=torch.contiguous_format)
        rows, _, groups = mask_logits.shape
        hard_codes = torch.empty((rows, groups) if statistics else (rows, 0), dtype=site.code_dtype)
        sums, codes = np.empty((rows, 2)), hard_codes.numpy()
        logits, bits, out = raw_bits(mask_logits), raw_bits(weight), raw_bits(masked)
        shape, named = self.kernels.shape_arguments(site.pattern), _sample_arguments(sample)

        def work(part: slice, global_row: int) -> None:
            self.kernels.forward(
                out[part],
                sums[part],
                codes[part],
                logits[part],
                bits[part],
                *shape,
                _place(site, global_row),
                *named,
            )

        on_all_threads(site.placement.blocks, work)
        return Sampled(
            masked,
            torch.from_numpy(sums.sum(0)),
            hard_codes if statistics else hard_codes.flatten(),
        )

    def backward(
        self,
        grad: torch.Tensor,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        sink: GradientSink = RETURNED,
    ) -> torch.Tensor:
        """Gradient at the logits, (O, L, G), of ``grad``, the gradient at W * M."""
        is_sum = sink.buffer is not None and not sink.replace
        buffer = torch.empty_like(mask_logits) if sink.buffer is None else sink.buffer
        gradient = buffer.contiguous()  # the kernels write memory, which a copy would hide
        logits, bits = raw_bits(mask_logits), raw_bits(weight)
        grad_bits, out = raw_bits(grad), raw_bits(gradient)
        shape, named = self.kernels.shape_arguments(site.pattern), _sample_arguments(sample)

        def work(part: slice, global_row: int) -> None:
            self.kernels.backward(
                out[part],
                is_sum,
                grad_bits[part],
                logits[part],
                bits[part],
                *shape,
                _place(site, global_row),
                *named,
                np.float32(sink.norm_coef),
            )

        on_all_threads(site.placement.blocks, work)
        return buffer if gradient is buffer else buffer.copy_(gradient)

    def mask_statistics(
        self, mask_logits: torch.Tensor, site: Site, kappa: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hard codes (O, G), sum over groups of the largest probability, 0-d)."""
        rows, _, groups = mask_logits.shape
        hard_codes = torch.empty((rows, groups), dtype=site.code_dtype)
        codes, largest_O, logits = hard_codes.numpy(), np.empty(rows), raw_bits(mask_logits)
        shape = self.kernels.shape_arguments(site.pattern)

        def work(part: slice, _global_row: int) -> None:
            self.kernels.mask_statistics(
                codes[part], largest_O[part], logits[part], *shape, np.float32(kappa)
            )

        on_all_threads([RowBlock(0, rows, 0)], work)
        return hard_codes, torch.tensor(largest_O.sum())


def _place(site: Site, global_row: int) -> tuple[int, int, int]:
    return global_row, site.placement.first_group, site.placement.groups_in_row


def _sample_arguments(sample: Sample) -> tuple[Any, ...]:
    """The noise key, (kappa, 1 / tau, noise) and hard, as the kernels take them."""
    key = sample.key
    words = tuple(map(np.uint64, (key.seed, key.step, key.micro_batch, key.parameter)))
    scales = tuple(map(np.float32, (sample.kappa, 1 / sample.tau, sample.noise)))
    return words, scales, sample.hard


def raw_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as uint16 (bf16) or uint32 (fp32); a copy only if it is not
    contiguous.
    """
    integer = torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint32
    return np.asarray(tensor.detach().contiguous().view(integer).numpy())


def on_all_threads(blocks: Iterable[RowBlock], work: Callable[[slice, int], None]) -> None:
    """Call ``work(local rows, global id of the first row)`` on slices of the blocks, one a thread.

    Rows are independent, so the split does not show in the results.
    """
    threads = 1 if is_worker() else torch.get_num_threads()
    calls = []
    for block in blocks:
        step = -(-block.rows // threads)
        for first in range(0, block.rows, step):
            rows = slice(block.start + first, block.start + min(first + step, block.rows))
            calls.append((rows, block.global_start + first))
    for _ in side_by_side(lambda call: work(*call), calls):
        pass


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work`` of every item on as many threads as PyTorch uses, results in the order of the items.

    The items are worked on in turn when PyTorch has one thread, and within such a thread: a layer
    that one thread works on is not split again.
    """
    threads = torch.get_num_threads()
    return map(work, items) if threads == 1 or is_worker() else _pool(threads).map(work, items)


def is_worker() -> bool:
    """Whether the caller runs on one of the threads of ``side_by_side``."""
    return getattr(_local, "is_worker", False)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        threads, thread_name_prefix="megamask-sampling", initializer=_mark_worker
    )


def _mark_worker() -> None:
    _local.is_worker = True
