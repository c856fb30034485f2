"""Checks of the Triton backend's k-subset distribution against plain PyTorch, run by
test_triton.py as triton_checks.py is.

Shapes: O out_features, I in_features, G groups per row, M group size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamask.sparsity.draw import Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement, RowBlock
from megamask.sparsity.subset import k_subset
from megamask.sparsity.subset.subset import SUBSET
from tests.unit.sparsity.kernels.triton_checks import (
    AT_NIGHT,
    BF16,
    DEVICE,
    DRAWS,
    FEW_ROWS,
    FP32,
    GROUPS,
    KEY,
    ROWS,
    SCALED,
    SINK,
    SOFT,
)
from tests.unit.sparsity.samplers import TRITON
from tests.unit.sparsity.subset import subsets
from tests.unit.sparsity.subset.rounding_error import EPS, bounds, check_within
from tests.unit.sparsity.test_backends import changed

# The hardware's log2 errs by 2^-22 / log2(16/15) = 2.6e-6 of a Gumbel at most, its exp by 2^-22: as
# much as a score's error of that size.
G_ERROR = 3e-6 if DEVICE == "cuda" else 0.0


def problem(
    n: int, m: int, logits: torch.dtype = FP32, weight: torch.dtype = FP32, rows: int = ROWS
) -> tuple[Site, list[torch.Tensor]]:
    """Site of a gated shard; gradient (O, I), logits (O, M, G), weight (O, I)."""
    site = Site(
        Pattern(n, m), Placement.shard(rows, GROUPS, axis=0, rank=1, size=2, stride=2), SUBSET
    )
    generator = torch.Generator().manual_seed(n * 10 + m)
    pi = 0.01 * torch.randn(rows, m, GROUPS, generator=generator)
    w, g = (torch.randn(rows, GROUPS * m, generator=generator) for _ in range(2))
    return site, [g.to(DEVICE, weight), pi.to(DEVICE, logits), w.to(DEVICE, weight)]


def rounding(dtype: torch.dtype) -> float:
    """Two results that nearly agree may round to neighbours: 2^-7 apart in bf16."""
    return 2.0**-7 if dtype == BF16 else 2 * EPS


CASES = [  # pattern, dtype of logits, of weight and gradient, draw; the interpreter is slow
    *((2, 4, FP32, dtype, draw) for dtype in (FP32, BF16) for draw in DRAWS),
    (2, 4, BF16, BF16, DRAWS[0]),
    *((2, 4, FP32, BF16, draw) for draw in SCALED),
    (1, 4, FP32, BF16, DRAWS[0]),
    (3, 4, FP32, FP32, DRAWS[1]),
    (2, 3, BF16, BF16, DRAWS[2]),
    *((4, 8, FP32, FP32, draw) for draw in DRAWS),
    (8, 16, FP32, BF16, DRAWS[0]),
    pytest.param(8, 16, BF16, FP32, DRAWS[1], marks=AT_NIGHT),
    pytest.param(8, 16, FP32, BF16, DRAWS[2], marks=AT_NIGHT),
    pytest.param(12, 16, FP32, BF16, SCALED[1], marks=AT_NIGHT),
    pytest.param(2, 32, FP32, FP32, DRAWS[2], marks=AT_NIGHT),
]


@pytest.mark.parametrize(("n", "m", "logits", "weight", "draw"), CASES)
def test_the_kernels_equal_the_plain_backend(
    n: int, m: int, logits: torch.dtype, weight: torch.dtype, draw: Sample
) -> None:
    site, (grad, pi, w) = problem(n, m, logits, weight, FEW_ROWS)
    bound = bounds(grad, pi, w, site, draw, SINK.norm_coef, G_ERROR)
    expected, found = (
        k_subset.forward(pi, w, site, draw, statistics=True),
        TRITON.forward(pi, w, site, draw, statistics=True),
    )
    assert found.masked.dtype == weight and found.hard_codes.dtype == site.code_dtype
    check_within(found.masked, expected.masked, bound.masked, rounding(weight))
    assert torch.equal(found.hard_codes, expected.hard_codes)
    # Squares, of what is still fp32, err twice as much relatively; each program sums about 100 of
    # them in fp32.
    squares = 2.02 * float(
        (bound.masked * expected.masked.double().abs()).sum()
    ) + 100 * EPS * float(expected.sums[0])
    assert abs(float(found.sums[0] - expected.sums[0])) <= squares

    hard_codes, largest = TRITON.mask_statistics(pi, site, draw.kappa)
    expected_codes, expected_largest = k_subset.mask_statistics(pi, site, draw.kappa)
    assert torch.equal(hard_codes, expected_codes) and hard_codes.dtype == site.code_dtype
    # 2 K scores below kappa max|pi| decide a probability and round; M K positive products; the
    # hardware's exp of each; sums of 100.
    size = min(n, m - n)
    statistics_error = (
        EPS * (4 * size * draw.kappa * float(pi.float().abs().max()) + 4 * m * size + 100)
        + m * G_ERROR
    )
    torch.testing.assert_close(largest, expected_largest, rtol=statistics_error, atol=0)
    assert abs(float(found.sums[1] / largest - 1)) < 100 * EPS

    expected_dlogits = k_subset.backward(grad, pi, w, site, draw, SINK)
    check_within(
        TRITON.backward(grad, pi, w, site, draw, SINK),
        expected_dlogits,
        bound.gradient,
        rounding(logits),
    )
    # The comparison is about something: the gradients are much larger than what they may differ by,
    # on average.
    assert float(expected_dlogits.float().abs().sum()) > (10 if draw.tau < 0.1 else 100) * float(
        bound.gradient.sum()
    )
    buffer = torch.randn(pi.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, logits)
    sink = replace(SINK, buffer=buffer)
    copy = replace(SINK, buffer=buffer.clone())
    expected_sum = k_subset.backward(grad, pi, w, site, draw, copy)
    assert TRITON.backward(grad, pi, w, site, draw, sink) is buffer
    check_within(buffer, expected_sum, bound.gradient, rounding(logits))
    TRITON.backward(grad, pi, w, site, draw, replace(sink, replace=True))
    check_within(buffer, expected_dlogits, bound.gradient, rounding(logits))


@pytest.mark.parametrize(
    "change",
    [
        {"kappa": -100.0},
        {"kappa": 1.0},
        {"tau": 1.0},
        {"noise": 0.9},
        {"noise": 0.0},
        {"hard": True},
        {"norm_coef": 0.0},
        {"key": replace(KEY, step=1)},
    ],
    ids=str,
)
def test_a_wrong_kernel_would_be_seen(change: dict[str, Any]) -> None:
    site, (grad, pi, w) = problem(2, 4)
    wrong = changed(SOFT, SINK, change)
    expected = k_subset.backward(grad, pi, w, site, SOFT, SINK)
    # ``hard`` shows in the gradient through the norm term alone.
    far = (TRITON.backward(grad, pi, w, site, *wrong) - expected).abs() > 10 * bounds(
        grad, pi, w, site, SOFT, SINK.norm_coef, G_ERROR
    ).gradient
    assert far.double().mean() > 0.5


HALVED = pytest.param(8, 16, True, marks=AT_NIGHT), pytest.param(8, 16, False, marks=AT_NIGHT)


@pytest.mark.parametrize(("n", "m", "hard"), [(4, 8, False), (4, 8, True), *HALVED])
def test_a_shard_has_the_bits_of_the_whole(n: int, m: int, hard: bool) -> None:
    _, (grad, pi, w) = problem(n, m, FP32, BF16)
    draw, place = (
        replace(SOFT, hard=hard),
        Placement((RowBlock(0, ROWS, 2**32 // GROUPS - 2),), 0, GROUPS),
    )  # ids pass 2^32 within a row
    whole = Site(Pattern(n, m), place, SUBSET)
    masked, gradient = (
        TRITON.forward(pi, w, whole, draw).masked,
        TRITON.backward(grad, pi, w, whole, draw, SINK),
    )
    check_within(
        masked,
        k_subset.forward(pi, w, whole, draw).masked,
        bounds(grad, pi, w, whole, draw, SINK.norm_coef, G_ERROR).masked,
        2.0**-7,
    )
    rows, groups, inputs = slice(1, 3), slice(3, 14), slice(3 * m, 14 * m)
    part = Site(
        whole.pattern,
        Placement((RowBlock(0, 2, place.blocks[0].global_start + 1),), 3, GROUPS),
        SUBSET,
    )
    some = (pi[rows, :, groups], w[rows, inputs], part, draw)
    assert torch.equal(TRITON.forward(*some).masked, masked[rows, inputs])
    assert torch.equal(TRITON.backward(grad[rows, inputs], *some, SINK), gradient[rows, :, groups])


@pytest.mark.parametrize(("n", "m", "hard"), [(2, 4, False), (2, 4, True), *HALVED])
def test_a_bad_logit_spoils_its_group_and_no_other(n: int, m: int, hard: bool) -> None:
    site, groups = Site(Pattern(n, m), Placement.whole(8, 8), SUBSET), [(0, 1), (3, 2), (5, 5)]
    logits, weight = torch.zeros(8, m, 8, device=DEVICE), torch.ones(8, 8 * m, device=DEVICE)
    spoiled = torch.zeros(8, 8, dtype=torch.bool, device=DEVICE)
    for (row, group), bad in zip(
        groups, (float("nan"), float("inf"), 1e38), strict=True
    ):  # 1e38 overflows when it is scaled
        logits[row, 2, group] = bad
        spoiled[row, group] = True
    draw = Sample(NoiseKey(1, 2), kappa=100.0, tau=1.0, hard=hard)
    masked, (norm, _), _ = TRITON.forward(logits, weight, site, draw)
    assert torch.equal(masked.isnan(), spoiled.repeat_interleave(m, 1))
    assert norm.isnan()
    assert torch.equal(TRITON.backward(weight, logits, weight, site, draw).isnan().any(1), spoiled)


@pytest.mark.parametrize(("n", "m"), [(2, 4), pytest.param(8, 16, marks=AT_NIGHT)])
def test_ties_keep_the_earlier_positions(n: int, m: int) -> None:
    site, (_, pi, w) = problem(n, m)
    hard_codes, _ = TRITON.mask_statistics(torch.zeros_like(pi), site, 1.0)
    assert torch.equal(site.mask_of(hard_codes), site.pattern.best(torch.zeros_like(w)))


def test_hard_masks_draw_positions_one_after_the_other() -> None:
    count, kappa = 2_000, 100.0
    positions = torch.tensor([0.012, -0.004, 0.001, -0.015], device=DEVICE)
    site = Site(Pattern(2, 4), Placement.whole(1, count), SUBSET)
    chance = subsets.one_after_the_other((kappa * positions.double()).exp().tolist(), 2)
    expected = count * torch.tensor(
        [chance[kept] for kept in site.pattern.kept_positions], dtype=torch.float64, device=DEVICE
    )

    def chi_square(kappa: float) -> float:
        draw = Sample(NoiseKey(seed=99, step=1), kappa, 0.7, hard=True)
        logits = positions[None, :, None].repeat(1, 1, count)
        masked = TRITON.forward(logits, torch.ones(1, 4 * count, device=DEVICE), site, draw).masked
        return float(
            (
                (
                    torch.bincount(site.pattern.index_of(masked).flatten(), minlength=6) - expected
                ).square()
                / expected
            ).sum()
        )

    assert chi_square(kappa) < 35.9  # P(chi-square of 5 degrees of freedom > 35.9) = 1e-6
    assert chi_square(-kappa) > 100
