"""The fused CPU kernels against the PyTorch backend, in both weight dtypes, and independent of
threads and of the place in memory.

Shapes: O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from megamask.errors import ConfigError
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import GradientSink, Sample, Site
from megamask.sparsity.kernels.numba_host import NumbaSampler
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask, sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.masks import is_valid
from tests.unit.sparsity.samplers import FUSED

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
PATTERNS = [(2, 4), (1, 4), (4, 8)]
SINK = GradientSink(norm_coef=1e-2)
EPS = 2.0**-24  # fp32 rounds to 24 bits


def problem(
    n: int, m: int, dtype: torch.dtype
) -> tuple[Site, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Site of a gated shard, logits (O, C, G), weight and gradient (O, I)."""
    site = Site(
        Pattern(n, m), Placement.shard(ROWS, GROUPS, axis=0, rank=1, size=2, stride=2), CATEGORICAL
    )
    generator = torch.Generator().manual_seed(n * 10 + m)
    logits = 0.01 * torch.randn(ROWS, site.pattern.num_candidates, GROUPS, generator=generator)
    weight, grad = (torch.randn(ROWS, GROUPS * m, generator=generator).to(dtype) for _ in range(2))
    return site, logits, weight, grad


def index_error(logits: torch.Tensor, draw: Sample) -> float:
    """Largest difference to expect in the relaxed index.

    The scores are (kappa pi + g) / tau with |g| < 17; each side rounds kappa pi, g (two logs, a few
    ulp each) and the sum, about 8 roundings of the score's size, and d softmax <= d score / 2 (both
    sides: once each).
    """
    largest = (draw.kappa * float(logits.abs().max()) + 17) / draw.tau
    return 8 * EPS * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("draw", DRAWS, ids=IDS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_fused_kernels_equal_the_plain_backend(
    n: int, m: int, draw: Sample, dtype: torch.dtype
) -> None:
    site, logits, weight, grad = problem(n, m, dtype)
    error, candidates = index_error(logits, draw), site.pattern.num_candidates
    expected, (expected_norm, _), _ = gumbel_softmax.forward(logits, weight, site, draw)
    masked, (norm, _), _ = FUSED.forward(logits, weight, site, draw)
    assert masked.dtype == dtype
    # A mask entry sums at most C index entries that err together (they sum to 1): twice the index
    # error, times |W| < 5; a result in bf16 (8 bits, so neighbours up to 2^-7 apart) may also round
    # to the neighbour.
    slack = 2 * error * 5
    torch.testing.assert_close(
        masked.float(),
        expected.float(),
        rtol=2.0**-7 if dtype == torch.bfloat16 else 4 * EPS,
        atol=slack,
    )
    torch.testing.assert_close(norm, expected_norm, rtol=4 * error + 1e-6, atol=0)

    expected_dlogits = gumbel_softmax.backward(grad, logits, weight, site, draw, SINK)
    dlogits = FUSED.backward(grad, logits, weight, site, draw, SINK)
    # dpi = kappa / tau * y * (dy - mean dy): |dy| sums n products of size |dW W| < 25, y errs by
    # ``error``, and dy by n roundings.
    size = draw.kappa / draw.tau * n * 25
    torch.testing.assert_close(
        dlogits, expected_dlogits, rtol=0, atol=size * (4 * error + 4 * n * EPS)
    )
    assert (
        float(expected_dlogits.abs().max()) > 100 * size * (4 * error + 4 * n * EPS)
        or draw.tau == 0.05
    )

    hard_codes, largest = FUSED.mask_statistics(logits, site, draw.kappa)
    expected_codes, expected_largest = gumbel_softmax.mask_statistics(logits, site, draw.kappa)
    assert torch.equal(hard_codes, expected_codes)
    # exp of differences below 2 kappa max|pi|, with C terms of which each rounds.
    statistics_error = EPS * (4 * draw.kappa * float(logits.abs().max()) + 4 * candidates)
    torch.testing.assert_close(largest, expected_largest, rtol=statistics_error, atol=0)


def changed(
    sample: Sample, sink: GradientSink, change: dict[str, Any]
) -> tuple[Sample, GradientSink]:
    """The sample and the sink with one of their fields changed."""
    if "norm_coef" in change:
        return sample, replace(sink, **change)
    return replace(sample, **change), sink


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
def test_a_wrong_kernel_would_be_seen(change: dict[str, Any]) -> None:
    site, logits, weight, grad = problem(2, 4, torch.float32)
    draw = DRAWS[0]
    wrong = changed(draw, SINK, change)
    tolerance = draw.kappa / draw.tau * 2 * 25 * (4 * index_error(logits, draw) + 8 * EPS)
    expected = gumbel_softmax.backward(grad, logits, weight, site, draw, SINK)
    # ``hard`` shows in the gradient through the norm term alone.
    assert (
        FUSED.backward(grad, logits, weight, site, *wrong) - expected
    ).abs().max() > 10 * tolerance


def test_hard_masks_differ_between_the_backends_only_at_near_ties() -> None:
    site, logits, weight, _ = problem(2, 4, torch.float32)
    draw = Sample(KEY, 100.0, 1.0, hard=True)
    plain, fused = (
        backend.forward(logits, torch.ones_like(weight), site, draw)[0]
        for backend in (gumbel_softmax, FUSED)
    )
    assert is_valid(site.pattern, fused)
    top = gumbel_softmax.soft_index(logits, site, draw).topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 4 * index_error(logits, draw)).repeat_interleave(4, dim=1)
    assert torch.equal(plain[clear], fused[clear])
    assert float(clear.float().mean()) > 0.99


@pytest.mark.parametrize("hard", [False, True])
def test_the_result_does_not_depend_on_threads_or_on_the_slice(hard: bool) -> None:
    site, logits, weight, grad = problem(2, 4, torch.bfloat16)
    draw = replace(DRAWS[0], hard=hard)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                (
                    FUSED.forward(logits, weight, site, draw)[0],
                    FUSED.backward(grad, logits, weight, site, draw, SINK),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    first, count = 3, 11  # groups 3 .. 13 of every row alone, as another rank would hold them
    part = Site(site.pattern, replace(site.placement, first_group=first), CATEGORICAL)
    cut = slice(4 * first, 4 * (first + count))
    some = (logits[..., first : first + count].contiguous(), weight[:, cut], part, draw)
    assert torch.equal(FUSED.forward(*some)[0], results[0][0][:, cut])
    assert torch.equal(
        FUSED.backward(grad[:, cut], *some, SINK), results[0][1][..., first : first + count]
    )


def test_extreme_logits_stay_finite() -> None:
    site, logits, weight, grad = problem(2, 4, torch.float32)
    draw = Sample(KEY, kappa=500.0, tau=0.05)
    for scale in (1.0, 100.0, 1e4):
        masked, (norm, _), _ = FUSED.forward(scale * logits, weight, site, draw)
        dlogits = FUSED.backward(grad, scale * logits, weight, site, draw, SINK)
        assert all(bool(torch.isfinite(one).all()) for one in (masked, norm, dlogits))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_dtype_of_the_gradient_at_the_mask_makes_no_difference(n: int, m: int) -> None:
    """One draw per step sums dW in fp32 beside bf16 weights: for values that bf16 holds, the same
    arithmetic and the same bits.
    """
    site, logits, weight, grad = problem(n, m, torch.bfloat16)
    narrow, wide = (
        FUSED.backward(one, logits, weight, site, DRAWS[0], SINK) for one in (grad, grad.float())
    )
    assert torch.equal(narrow, wide)
    assert not torch.equal(
        narrow, FUSED.backward(grad.float() + 2.0**-12, logits, weight, site, DRAWS[0], SINK)
    )


def test_gradients_that_are_not_contiguous() -> None:
    site, logits, weight, grad = problem(2, 4, torch.float32)
    leaf = logits.clone().requires_grad_()
    masked = sample_mask(
        leaf, weight, site, DRAWS[0], sampler_for("numba", site.distribution), SINK
    ).masked
    masked.backward(grad.T.contiguous().T)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, FUSED.backward(grad, logits, weight, site, DRAWS[0], SINK))


def test_logits_and_buffers_that_are_not_contiguous() -> None:
    site, logits, weight, grad = problem(2, 4, torch.float32)
    expected = FUSED.backward(grad, logits, weight, site, DRAWS[0], SINK)
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(FUSED.backward(grad, turned, weight, site, DRAWS[0], SINK), expected)
    buffer = torch.full_like(turned, 7.0)
    sink = replace(SINK, buffer=buffer, replace=True)
    assert FUSED.backward(grad, logits, weight, site, DRAWS[0], sink) is buffer
    assert torch.equal(buffer, expected)


def test_choosing_a_backend() -> None:
    cpu = torch.device("cpu")
    assert [choose_backend(name, cpu, CATEGORICAL) for name in ("torch", "numba", "auto")] == [
        "torch",
        "numba",
        "numba",
    ]
    assert sampler_for("torch", CATEGORICAL) is gumbel_softmax
    assert isinstance(sampler_for("numba", CATEGORICAL), NumbaSampler)
    with pytest.raises(ConfigError, match="learn.sampling.backend"):
        choose_backend("numba", torch.device("cuda"), CATEGORICAL)
    with pytest.raises(ConfigError, match="learn.sampling.backend"):
        choose_backend("triton", cpu, CATEGORICAL)


def test_without_its_package_auto_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "numba" else object()
    )
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", torch.device("cpu"), CATEGORICAL) == "torch"
    assert "numba is not installed" in caplog.text
    with pytest.raises(ConfigError, match="pip install numba"):
        choose_backend("numba", torch.device("cpu"), CATEGORICAL)
