"""Sampling of CUDA tensors through the fused Triton kernels of a distribution.

A distribution's ``*_triton`` module exports ``kernels_of(pattern, device)``, the kernels for this
pattern with the constants by which they know it (``triton_tiles.Kernels``).

Under TRITON_INTERPRET=1, set before triton is first imported, the same kernels run on CPU tensors:
slowly, for tests. Nothing here waits for the device, and no number that changes from step to step
makes Triton compile again.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Sampled, Site
from megamask.sparsity.shard import RowBlock

WARPS = 4
THREADS = 32 * WARPS  # of a program
# Where the compiler itself chooses which product and sum become one rounding, its choice depends on
# the tile, and with it the bits on the layout. The kernels name every fused one (``tl.fma``).
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
WIDTHS = (512, 256, 128, 64, 32)  # of a tile, in groups; not below 32: lines are read whole
# A thread in a big layer has so many groups, in one tile or one after the other: they share the
# fixed costs of a program.
GROUPS_OF_A_THREAD = 4
# A layer with fewer groups (17 million weights at 2:4) gives a thread one group and each tile a
# program of its own, to occupy the device.
MANY_GROUPS = 1 << 22
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class TritonSampler:
    """``draw.Sampler`` by fused kernels; fp32 or bf16 logits, weights and gradients."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels_of = functools.cache(kernels.kernels_of)

    def forward(
        self,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        statistics: bool = False,
    ) -> Sampled:
        """Sample a mask and apply it to the weight."""
        logits, words = mask_logits.detach().contiguous(), _words(weight, site)
        masked = torch.empty_like(weight, memory_format=torch.contiguous_format)
        out, kernels = _words(masked, site), self.kernels_of(site.pattern, logits.device)
        rows, _, groups = logits.shape
        hard_codes = logits.new_empty((rows, groups) if statistics else 0, dtype=site.code_dtype)
        cut = Cut.of(rows, groups, *kernels.sharing)
        sums = logits.new_empty(
            (2, sum(cut.programs(block.rows) for block in site.placement.blocks)),
            dtype=torch.float32,
        )
        first = 0
        for block, here in blocks_of(site):
            programs = cut.programs(block.rows)
            launch(
                kernels.forward,
                programs,
                logits,
                out[here],
                hard_codes[here],
                sums[:, first:],
                logits[here],
                words[here],
                block.rows,
                groups,
                sums.shape[1],
                *place_arguments(block, site),
                *noise_arguments(sample),
                float(sample.kappa),
                **kernels.constants,
                BITS=_bits(weight),
                NOISE=sample.noise > 0,
                HARD=sample.hard,
                STATISTICS=statistics,
                **cut.constants,
            )
            first += programs
        return Sampled(masked, sums.sum(1, dtype=torch.float64), hard_codes)

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
        logits = mask_logits.detach().contiguous()
        words, grads = _words(weight, site), _words(grad, site)
        kernels, buffer = self.kernels_of(site.pattern, logits.device), sink.buffer
        gradient = torch.empty_like(logits) if buffer is None else buffer.contiguous()
        cut = Cut.of(logits.shape[0], logits.shape[-1], *kernels.sharing)
        for block, here in blocks_of(site):
            launch(
                kernels.backward,
                cut.programs(block.rows),
                logits,
                gradient[here],
                grads[here],
                logits[here],
                words[here],
                block.rows,
                logits.shape[-1],
                *place_arguments(block, site),
                *noise_arguments(sample),
                float(sink.norm_coef),
                **kernels.constants,
                BITS=_bits(weight),
                GRAD_BITS=_bits(grad),
                NOISE=sample.noise > 0,
                HARD=sample.hard,
                ADD=buffer is not None and not sink.replace,
                **cut.constants,
            )
        return gradient if buffer is None or gradient is buffer else buffer.copy_(gradient)

    def mask_statistics(
        self, mask_logits: torch.Tensor, site: Site, kappa: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hard codes (O, G), sum over groups of the largest probability, 0-d)."""
        logits = mask_logits.detach().contiguous()
        rows, _, groups = logits.shape
        kernels = self.kernels_of(site.pattern, logits.device)
        cut = Cut.of(rows, groups, *kernels.sharing)
        hard_codes = logits.new_empty((rows, groups), dtype=site.code_dtype)
        sums = logits.new_empty(cut.programs(rows), dtype=torch.float32)
        launch(
            kernels.mask_statistics,
            len(sums),
            logits,
            hard_codes,
            sums,
            logits,
            rows,
            groups,
            float(kappa),
            **kernels.statistics_constants,
            **cut.constants,
        )
        return hard_codes, sums.sum(dtype=torch.float64)


class Cut(NamedTuple):
    """How (O, G) groups are cut into tiles of ``rows`` x ``cols``, ``tiles`` tiles a program."""

    groups: int
    rows: int
    cols: int
    tiles: int

    @classmethod
    def of(cls, rows: int, groups: int, groups_a_thread: int = 1, threads_a_group: int = 1) -> Cut:
        """The widest tile that leaves at most a sixteenth of a row's threads idle at its end, else
        the tile that leaves the fewest. Few widths serve all layers: each width is a compile.

        Args:
            rows: of the layer.
            groups: of a row.
            groups_a_thread: of the kernels, in a layer with many groups.
            threads_a_group: of the kernels.
        """
        is_big = rows * groups >= MANY_GROUPS
        several = groups_a_thread if is_big else 1
        size = THREADS * several // threads_a_group
        covered = {width: -(-groups // width) * width for width in WIDTHS if width <= size}
        enough = [width for width, threads in covered.items() if 16 * threads <= 17 * groups]
        cols = enough[0] if enough else min(covered, key=lambda width: covered[width])
        tiles = GROUPS_OF_A_THREAD // several if is_big else 1
        return cls(groups, size // cols, cols, tiles)

    def programs(self, rows: int) -> int:
        """How many programs cover ``rows`` rows."""
        tiles = math.ceil(rows / self.rows) * math.ceil(self.groups / self.cols)
        return math.ceil(tiles / self.tiles)

    @property
    def constants(self) -> dict[str, int]:
        """Arguments of the kernels."""
        return {"ROWS": self.rows, "COLS": self.cols, "TILES": self.tiles}


def launch(kernel: Any, programs: int, on: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """Start ``programs`` programs of a kernel on the device of ``on``."""
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


def blocks_of(site: Site) -> Iterator[tuple[RowBlock, slice]]:
    """Row blocks with the local rows that they cover."""
    for block in site.placement.blocks:
        yield block, slice(block.start, block.start + block.rows)


def _words(tensor_OI: torch.Tensor, site: Site) -> torch.Tensor:
    """The tensor as (O, words) integers as wide as divide a group: a 2:4 group in bf16 is one
    64-bit word.
    """
    size = math.gcd(8, site.pattern.m * tensor_OI.element_size())
    whole = tensor_OI.detach().contiguous()
    if whole.data_ptr() % size:
        whole = whole.clone()
    return whole.view(WORDS[size])


def _bits(tensor: torch.Tensor) -> int:
    return 8 * tensor.element_size()


def place_arguments(block: RowBlock, site: Site) -> tuple[int, int, int]:
    return block.global_start, site.placement.first_group, site.placement.groups_in_row


def noise_arguments(sample: Sample) -> tuple[int, int, int, int, float, float]:
    """The key, kappa / tau and noise / tau, in the order of the kernels' arguments."""
    key, slope, scale = sample.key, sample.kappa / sample.tau, sample.noise / sample.tau
    return key.seed, key.step, key.parameter, key.micro_batch, slope, scale
