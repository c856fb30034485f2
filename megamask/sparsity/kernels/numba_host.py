"""The sampling operator on CPU tensors through the fused numba kernels; same meaning as
gumbel_softmax.py and k_subset.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch

from megamask.sparsity.categorical import gumbel_softmax_numba
from megamask.sparsity.draw import Draw, Sampled, Site
from megamask.sparsity.kernels.threads import is_worker, side_by_side
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import RowBlock
from megamask.sparsity.subset import k_subset_numba


def forward(mask_logits: torch.Tensor, weight: torch.Tensor, site: Site, draw: Draw) -> Sampled:
    """Sample a mask and apply it to the weight."""
    masked = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows, _, groups = mask_logits.shape
    hard_codes = torch.empty((rows, groups) if draw.watch else (rows, 0), dtype=site.code_dtype)
    sums, looked, kernels = np.empty((rows, 2)), hard_codes.numpy(), _kernels(site)
    logits, bits, out = raw_bits(mask_logits), raw_bits(weight), raw_bits(masked)

    def work(part: slice, global_row: int) -> None:
        kernels.forward(
            out[part],
            sums[part],
            looked[part],
            logits[part],
            bits[part],
            *_arguments(site, draw, global_row),
        )

    on_all_threads(site.placement.blocks, work)
    return Sampled(
        masked, torch.from_numpy(sums.sum(0)), hard_codes if draw.watch else hard_codes.flatten()
    )


def backward(
    grad: torch.Tensor,
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    draw: Draw,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient at the logits, (O, C, G), of ``grad``, the gradient at W * M; added to ``into``, or
    put there if ``draw.fresh``.
    """
    is_sum = into is not None and not draw.fresh
    dlogits = torch.empty_like(mask_logits) if into is None else into
    logits, bits, dbits, out = (
        raw_bits(mask_logits),
        raw_bits(weight),
        raw_bits(grad),
        raw_bits(dlogits),
    )
    kernels = _kernels(site)

    def work(part: slice, global_row: int) -> None:
        arguments = _arguments(site, draw, global_row)
        kernels.backward(
            out[part],
            is_sum,
            dbits[part],
            logits[part],
            bits[part],
            *arguments,
            np.float32(draw.norm_coef),
        )

    on_all_threads(site.placement.blocks, work)
    return dlogits


def mask_statistics(
    mask_logits: torch.Tensor, site: Site, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(winners (O, G), sum over groups of the largest probability, 0-d)."""
    rows, _, groups = mask_logits.shape
    hard_codes, largest_O, logits = (
        torch.empty((rows, groups), dtype=site.code_dtype),
        np.empty(rows),
        raw_bits(mask_logits),
    )
    found = hard_codes.numpy()

    def work(part: slice, _global_row: int) -> None:
        if site.distribution == "linear":
            k_subset_numba.mask_statistics(
                found[part],
                largest_O[part],
                logits[part],
                *_subsets(site.pattern),
                np.float32(kappa),
            )
        else:
            gumbel_softmax_numba.mask_statistics(
                found[part], largest_O[part], logits[part], np.float32(kappa)
            )

    on_all_threads([RowBlock(0, rows, 0)], work)
    return hard_codes, torch.tensor(largest_O.sum())


def supports(mask_logits: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels read these dtypes."""
    return all(tensor.dtype in (torch.bfloat16, torch.float32) for tensor in (mask_logits, weight))


def on_all_threads(blocks: Iterable[RowBlock], work: Callable[[slice, int], None]) -> None:
    """Call ``work(local rows, global id of the first)`` on slices of the blocks, one a thread; rows
    are independent.
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


def raw_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as uint16 (bf16) or uint32 (fp32); a copy only if it is not
    contiguous.
    """
    integer = torch.uint16 if tensor.dtype == torch.bfloat16 else torch.uint32
    return np.asarray(tensor.detach().contiguous().view(integer).numpy())


def _kernels(site: Site) -> ModuleType:
    return k_subset_numba if site.distribution == "linear" else gumbel_softmax_numba


@functools.lru_cache
def _candidates(pattern: Pattern) -> tuple[np.ndarray[Any, Any], int]:
    """Kept positions of every candidate, (C, N), and M."""
    return np.array(pattern.kept_positions, dtype=np.int64), pattern.m


@functools.lru_cache
def _subsets(pattern: Pattern) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tuples of N and of M; their lengths are what counts."""
    return tuple(range(pattern.n)), tuple(range(pattern.m))


def _key(key: NoiseKey) -> tuple[np.uint64, ...]:
    return (
        np.uint64(key.seed),
        np.uint64(key.step),
        np.uint64(key.micro_batch),
        np.uint64(key.parameter),
    )


def _arguments(site: Site, draw: Draw, global_row: int) -> tuple[Any, ...]:
    place = (global_row, site.placement.first_group, site.placement.groups_in_row)
    scale = (np.float32(draw.kappa), np.float32(1 / draw.tau))
    shape = _subsets(site.pattern) if site.distribution == "linear" else _candidates(site.pattern)
    return (*shape, place, _key(draw.key), *scale, draw.hard)
