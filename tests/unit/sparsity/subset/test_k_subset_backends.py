"""The fused CPU kernels of the k-subset distribution against plain PyTorch, and independent of
threads and of the place in memory.

Shapes: O out_features, I in_features, G groups per row, M group size.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch

from megamask.errors import ConfigError
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.draw import GradientSink, Sample, Site
from megamask.sparsity.kernels.numba_host import NumbaSampler
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset import k_subset
from megamask.sparsity.subset.llvm_polynomials import sorting_network
from megamask.sparsity.subset.subset import SUBSET
from tests.masks import is_valid
from tests.unit.sparsity.samplers import FUSED
from tests.unit.sparsity.subset.rounding_error import EPS, bounds, check_within
from tests.unit.sparsity.test_backends import changed

ROWS, GROUPS = 12, 37  # GROUPS is no multiple of a vector's lanes
KEY = NoiseKey(seed=2**32 - 1, step=2**31, micro_batch=5, parameter=2**32 - 7)
DRAWS = [
    Sample(KEY, kappa=100.0, tau=4.0),
    Sample(KEY, kappa=300.0, tau=0.5),
    Sample(KEY, kappa=500.0, tau=0.05),
    Sample(KEY, kappa=300.0, tau=1.0, hard=True),
    Sample(KEY, kappa=300.0, tau=0.5, noise=0.5),
    Sample(KEY, kappa=300.0, tau=0.5, noise=0.0),
    Sample(KEY, kappa=300.0, tau=1.0, hard=True, noise=0.0),
]
IDS = ["soft-warm", "soft-cool", "soft-cold", "hard", "half", "quiet", "quiet-hard"]
SINK = GradientSink(norm_coef=1e-2)
FP32, BF16 = torch.float32, torch.bfloat16
# A shape and a dtype of the weights compile kernels of their own, about ten seconds each. 5:6 keeps
# more than half of a group, as 3:4 does; the weights' dtype enters the kernels of every shape in
# the same two places, which 2:4 checks.
SHAPES = [(2, 4, FP32), (2, 4, BF16), (4, 8, FP32), (1, 4, FP32), (5, 6, FP32), (8, 16, FP32)]
MORE = [(4, 8, BF16), (3, 4, FP32), (3, 4, BF16), (1, 4, BF16), (5, 6, BF16), (8, 16, BF16)]


def problem(
    n: int, m: int, dtype: torch.dtype = torch.float32
) -> tuple[Site, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Site of a gated shard, logits (O, M, G), weight and gradient (O, I)."""
    site = Site(
        Pattern(n, m), Placement.shard(ROWS, GROUPS, axis=0, rank=1, size=2, stride=2), SUBSET
    )
    generator = torch.Generator().manual_seed(n * 10 + m)
    logits = 0.01 * torch.randn(ROWS, m, GROUPS, generator=generator)
    weight, grad = (torch.randn(ROWS, GROUPS * m, generator=generator).to(dtype) for _ in range(2))
    return site, logits, weight, grad


@pytest.mark.parametrize("draw", DRAWS, ids=IDS)
@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.nightly) for shape in MORE)],
    ids=str,
)
def test_the_fused_kernels_equal_the_plain_backend(
    n: int, m: int, draw: Sample, dtype: torch.dtype
) -> None:
    site, logits, weight, grad = problem(n, m, dtype)
    bound = bounds(grad, logits, weight, site, draw, SINK.norm_coef)
    expected = k_subset.forward(logits, weight, site, draw, statistics=True)
    found = FUSED.forward(logits, weight, site, draw, statistics=True)
    assert found.masked.dtype == dtype
    # bf16 has 8 bits: two results that nearly agree may round to neighbours up to 2^-7 apart.
    check_within(
        found.masked, expected.masked, bound.masked, 2.0**-7 if dtype == torch.bfloat16 else 2 * EPS
    )
    # Squares of what is still fp32: twice each one's bound, which 1 % covers where this W * M is
    # rounded to bf16, and its own rounding.
    squares = 2.02 * float((bound.masked * expected.masked.double().abs()).sum()) + 4 * EPS * float(
        expected.sums[0]
    )
    assert abs(float(found.sums[0] - expected.sums[0])) <= squares
    assert torch.equal(found.hard_codes, expected.hard_codes)

    expected_dlogits = k_subset.backward(grad, logits, weight, site, draw, SINK)
    check_within(
        FUSED.backward(grad, logits, weight, site, draw, SINK),
        expected_dlogits,
        bound.gradient,
        0.0,
    )
    # The comparison is about something: the gradients are much larger than what they may differ by,
    # on average.
    assert float(expected_dlogits.abs().sum()) > (10 if draw.tau < 0.1 else 100) * float(
        bound.gradient.sum()
    )

    hard_codes, largest = FUSED.mask_statistics(logits, site, draw.kappa)
    expected_codes, expected_largest = k_subset.mask_statistics(logits, site, draw.kappa)
    assert torch.equal(hard_codes, expected_codes) and hard_codes.dtype == site.code_dtype
    # 2 M scores below kappa max|pi| round, and M K positive products.
    statistics_error = EPS * (
        4 * m * draw.kappa * float(logits.abs().max()) + 4 * m * min(n, m - n)
    )
    torch.testing.assert_close(largest, expected_largest, rtol=statistics_error, atol=0)
    assert abs(float(found.sums[1] / largest - 1)) < 1e-12


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
    ],
    ids=str,
)
def test_a_wrong_kernel_would_be_seen(change: dict[str, float]) -> None:
    site, logits, weight, grad = problem(4, 8)
    draw = DRAWS[0]
    bound = bounds(grad, logits, weight, site, draw, SINK.norm_coef).gradient
    expected = k_subset.backward(grad, logits, weight, site, draw, SINK)
    wrong = FUSED.backward(grad, logits, weight, site, *changed(draw, SINK, change))
    # ``hard`` shows in the gradient through the norm term alone.
    assert ((wrong - expected).abs() > 10 * bound).double().mean() > 0.5


@pytest.mark.parametrize("shape", [(2, 4), (5, 6), (8, 16)])
def test_hard_masks_are_legal_also_where_scores_are_equal(shape: tuple[int, int]) -> None:
    site, logits, weight, _ = problem(*shape)
    hard = Sample(KEY, 100.0, 1.0, hard=True)
    fused, plain = (
        one.forward(logits, torch.ones_like(weight), site, hard).masked for one in (FUSED, k_subset)
    )
    assert is_valid(site.pattern, fused)
    assert float((fused == plain).float().mean()) > 0.999  # near-ties may differ
    flat = torch.zeros_like(logits)
    hard_codes, _ = FUSED.mask_statistics(
        flat, site, 1.0
    )  # no noise: every score is equal, and the earlier positions win
    assert torch.equal(site.mask_of(hard_codes), site.pattern.best(torch.zeros_like(weight)))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("backend", [k_subset, FUSED])
@pytest.mark.parametrize(("n", "m", "dtype"), [(2, 4, BF16), (4, 8, FP32)], ids=str)
def test_the_result_does_not_depend_on_threads_or_on_the_slice(
    n: int, m: int, dtype: torch.dtype, backend: ModuleType, hard: bool
) -> None:
    """Of shapes whose kernels the comparison above has compiled."""
    site, logits, weight, grad = problem(n, m, dtype)
    draw = replace(DRAWS[0], hard=hard)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                (
                    backend.forward(logits, weight, site, draw).masked,
                    backend.backward(grad, logits, weight, site, draw, SINK),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    first, count = 3, 11  # groups 3 .. 13 of every row alone, as another rank would hold them
    part = replace(site, placement=replace(site.placement, first_group=first))
    cut = slice(m * first, m * (first + count))
    some = (logits[..., first : first + count].contiguous(), weight[:, cut], part, draw)
    assert torch.equal(backend.forward(*some).masked, results[0][0][:, cut])
    assert torch.equal(
        backend.backward(grad[:, cut], *some, SINK), results[0][1][..., first : first + count]
    )
    moved = replace(part, placement=site.placement)
    assert not torch.equal(
        backend.forward(*some[:2], moved, draw).masked, results[0][0][:, cut]
    )  # local numbers for global ones


# A buffer in fp32 beside logits in bf16 compiles a kernel more.
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=pytest.mark.nightly)], ids=str)
def test_bf16_logits_and_a_buffer_to_add_to(dtype: torch.dtype) -> None:
    site, logits, weight, grad = problem(2, 4, torch.bfloat16)
    low, draw = logits.bfloat16(), DRAWS[0]
    dlogits = FUSED.backward(grad, low.float(), weight, site, draw, SINK)
    assert torch.equal(
        FUSED.forward(low, weight, site, draw).masked,
        FUSED.forward(low.float(), weight, site, draw).masked,
    )
    assert torch.equal(FUSED.backward(grad, low, weight, site, draw, SINK), dlogits.bfloat16())
    buffer = torch.ones_like(dlogits, dtype=dtype)
    sink = replace(SINK, buffer=buffer)
    assert FUSED.backward(grad, low, weight, site, draw, sink) is buffer
    assert torch.equal(buffer, (1 + dlogits).to(dtype))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("backend", [k_subset, FUSED])
@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), 1e38]
)  # 1e38 overflows when it is scaled
def test_a_bad_logit_spoils_its_group_and_no_other(
    backend: ModuleType, bad: float, hard: bool
) -> None:
    site = Site(Pattern(2, 4), Placement.whole(8, 4), SUBSET)
    logits, weight, draw = (
        torch.zeros(8, 4, 4),
        torch.ones(8, 16),
        Sample(NoiseKey(1, 2), kappa=100.0, tau=1.0, hard=hard),
    )
    logits[3, 2, 1] = bad
    masked, (norm, _), _ = backend.forward(logits, weight, site, draw)
    spoiled = torch.zeros(8, 16, dtype=torch.bool)
    spoiled[3, 4:8] = True
    assert torch.equal(masked.isnan(), spoiled)
    assert norm.isnan()
    dlogits = backend.backward(torch.ones(8, 16), logits, weight, site, draw)
    assert torch.equal(
        dlogits.isnan().transpose(1, 2).repeat_interleave(1, 0).reshape(8, 16), spoiled
    )


def test_cold_draws_stay_finite_and_leave_the_processor_as_it_was() -> None:
    site, logits, weight, grad = problem(8, 16)
    draw = Sample(KEY, kappa=500.0, tau=0.05)
    for scale in (1.0, 100.0, 1e4):
        masked, (norm, _), _ = FUSED.forward(scale * logits, weight, site, draw)
        dlogits = FUSED.backward(grad, scale * logits, weight, site, draw, SINK)
        assert all(bool(torch.isfinite(one).all()) for one in (masked, norm, dlogits))
    FUSED.mask_statistics(logits, site, 1.0)
    assert np.float32(1e-38) * np.float32(1e-3) > 0  # numbers below 2^-126 exist again


def test_choosing_a_backend(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_backend("auto", torch.device("cpu"), SUBSET) == "numba"
    assert choose_backend("triton", torch.device("cuda"), SUBSET) == "triton" or not find_spec(
        "triton"
    )
    assert isinstance(sampler_for("numba", SUBSET), NumbaSampler)
    assert sampler_for("torch", SUBSET) is k_subset
    monkeypatch.setattr(SUBSET, "numba", None)
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", torch.device("cpu"), SUBSET) == "torch"
    assert "numba has no kernels of the subset distribution" in caplog.text
    with pytest.raises(ConfigError, match=r"learn.sampling.backend.*has no kernels"):
        choose_backend("numba", torch.device("cpu"), SUBSET)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 11, 16, 32])
def test_the_network_sorts(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(100):
        numbers = torch.randint(count, (count,), generator=generator).tolist()
        line = list(numbers)
        for a, b in sorting_network(count):
            line[a], line[b] = max(line[a], line[b]), min(line[a], line[b])
        assert line == sorted(numbers, reverse=True)
