"""The sampling operator through the fused Triton kernels, for CUDA tensors; same meaning as
gumbel_softmax.py and k_subset.py.

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

from megamask.sparsity.categorical import gumbel_softmax_looped_triton, gumbel_softmax_triton
from megamask.sparsity.draw import Draw, Sampled, Site
from megamask.sparsity.pattern import MAX_CANDIDATES, Pattern
from megamask.sparsity.shard import RowBlock
from megamask.sparsity.subset import k_subset_triton

WARPS = 4
TILE = (
    32 * WARPS
)  # one group a thread: all tensors of a program then have one layout, and nothing moves between threads
TILES = 4  # a program's in a big layer: they share its fixed costs
MANY_TILES = (
    1 << 15
)  # a layer with fewer (4 million weights at 2:4) gives each its own program, to occupy the device
# up to so many candidates, kernels hold all of a group in registers; compiling them takes quadratic
# time
UNROLLED = 32
MAX_POSITIONS = 32
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
DTYPES = (torch.float32, torch.bfloat16)


def forward(mask_logits: torch.Tensor, weight: torch.Tensor, site: Site, draw: Draw) -> Sampled:
    """Sample a mask and apply it to the weight."""
    logits, words = mask_logits.detach().contiguous(), _words(weight, site)
    masked = torch.empty_like(weight, memory_format=torch.contiguous_format)
    out = _words(masked, site)
    rows, _, groups = logits.shape
    hard_codes = logits.new_empty((rows, groups) if draw.watch else 0, dtype=site.code_dtype)
    cut = Cut.of(rows, groups)
    sums = logits.new_empty(
        (2, sum(cut.programs(block.rows) for block in site.placement.blocks)), dtype=torch.float32
    )
    first = 0
    for block, here in _blocks(site):
        programs = cut.programs(block.rows)
        _launch(
            _kernels(site).forward,
            programs,
            logits,
            out[here],
            hard_codes[here],
            sums[:, first:],
            logits[here],
            words[here],
            block.rows,
            sums.shape[1],
            *_place(block, site),
            *_noise(draw),
            float(draw.kappa),
            **_shape(site, logits.device),
            BITS=_bits(weight),
            HARD=draw.hard,
            WATCH=draw.watch,
            **cut.constants,
        )
        first += programs
    return Sampled(masked, sums.sum(1, dtype=torch.float64), hard_codes)


def backward(
    grad: torch.Tensor,
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    draw: Draw,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient at the logits, (O, C or M, G), of ``grad``, the gradient at W * M; added to ``into``
    where that is given.
    """
    logits, words, grads = (
        mask_logits.detach().contiguous(),
        _words(weight, site),
        _words(grad, site),
    )
    dlogits = torch.empty_like(logits) if into is None else into.contiguous()
    cut = Cut.of(logits.shape[0], logits.shape[-1])
    for block, here in _blocks(site):
        _launch(
            _kernels(site).backward,
            cut.programs(block.rows),
            logits,
            dlogits[here],
            grads[here],
            logits[here],
            words[here],
            block.rows,
            *_place(block, site),
            *_noise(draw),
            float(draw.norm_coef),
            **_shape(site, logits.device),
            BITS=_bits(weight),
            GRAD_BITS=_bits(grad),
            HARD=draw.hard,
            ADD=into is not None and not draw.fresh,
            **cut.constants,
        )
    return dlogits if into is None or dlogits is into else into.copy_(dlogits)


def mask_statistics(
    mask_logits: torch.Tensor, site: Site, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(winners (O, G), sum over groups of the largest probability, 0-d)."""
    logits = mask_logits.detach().contiguous()
    rows, candidates, groups = logits.shape
    shape = (
        {"N": site.pattern.n, "M": candidates}
        if site.distribution == "linear"
        else {"C": candidates}
    )
    cut = Cut.of(rows, groups)
    hard_codes = logits.new_empty((rows, groups), dtype=site.code_dtype)
    sums = logits.new_empty(cut.programs(rows), dtype=torch.float32)
    _launch(
        _kernels(site).mask_statistics,
        len(sums),
        logits,
        hard_codes,
        sums,
        logits,
        rows,
        float(kappa),
        **shape,
        **cut.constants,
    )
    return hard_codes, sums.sum(dtype=torch.float64)


def supports(mask_logits: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels read these dtypes, and have room for the pattern."""
    _, candidates, groups = mask_logits.shape
    fits = candidates <= MAX_CANDIDATES and weight.shape[1] <= MAX_POSITIONS * groups
    return fits and mask_logits.dtype in DTYPES and weight.dtype in DTYPES


class Cut(NamedTuple):
    """How (O, G) groups are cut into tiles of ``rows`` x ``cols``, ``tiles`` tiles a program."""

    groups: int
    rows: int
    cols: int
    tiles: int

    @classmethod
    def of(cls, rows: int, groups: int) -> Cut:
        """The width that leaves the fewest threads idle at the end of a row; not below 32, so that
        lines are read whole.
        """
        cols = min((128, 64, 32), key=lambda width: -(-groups // width) * width)
        return cls(groups, TILE // cols, cols, TILES if rows * groups >= MANY_TILES * TILE else 1)

    def programs(self, rows: int) -> int:
        """How many programs cover ``rows`` rows."""
        tiles = math.ceil(rows / self.rows) * math.ceil(self.groups / self.cols)
        return math.ceil(tiles / self.tiles)

    @property
    def constants(self) -> dict[str, int]:
        """Arguments of the kernels."""
        return {"GROUPS": self.groups, "ROWS": self.rows, "COLS": self.cols, "TILES": self.tiles}


def _kernels(site: Site) -> ModuleType:
    if site.distribution == "linear":
        return k_subset_triton
    return (
        gumbel_softmax_triton if site.logits_per_group <= UNROLLED else gumbel_softmax_looped_triton
    )


def _launch(
    kernel: Any, programs: int, on: torch.Tensor, *arguments: Any, **constants: Any
) -> None:
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, num_warps=WARPS, enable_fp_fusion=True)


def _blocks(site: Site) -> Iterator[tuple[RowBlock, slice]]:
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


def _shape(site: Site, device: torch.device) -> dict[str, Any]:
    """What the kernels want to know of the pattern."""
    if site.distribution == "linear":
        return {"N": site.pattern.n, "M": site.pattern.m}
    return _candidates(site.pattern, device)


@functools.cache
def _candidates(pattern: Pattern, device: torch.device) -> dict[str, Any]:
    """Candidates, members, and the table as the kernels want it."""
    shape = {"C": pattern.num_candidates, "M": pattern.m}
    codes = [sum(1 << j for j in kept) for kept in pattern.kept_positions]
    if pattern.num_candidates <= UNROLLED:
        return {**shape, "TABLE": sum(code << (c * pattern.m) for c, code in enumerate(codes))}
    return {**shape, "codes": torch.tensor([*codes, 0, 0, 0], device=device)}


def _place(block: RowBlock, site: Site) -> tuple[int, int, int]:
    return block.global_start, site.placement.first_group, site.placement.groups_in_row


def _noise(draw: Draw) -> tuple[int, int, int, int, float, float]:
    key = draw.key
    return key.seed, key.step, key.parameter, key.micro_batch, draw.kappa / draw.tau, 1 / draw.tau
