"""The PyTorch backend against the fp64 reference and against finite differences; wrong answers are
shown to fail.

Shapes: O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import GradientSink, Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.masks import is_valid
from tests.unit.sparsity.categorical import reference

ROWS, GROUPS = 6, 5
KEY = NoiseKey(seed=7, step=3, micro_batch=2, parameter=12345)
DRAWS = [
    Sample(KEY, kappa=100.0, tau=4.0),
    Sample(KEY, kappa=300.0, tau=0.5),
    Sample(KEY, kappa=100.0, tau=4.0, hard=True),
    Sample(KEY, kappa=300.0, tau=0.5, hard=True),
    Sample(KEY, kappa=300.0, tau=1.0, noise=0.5),
    Sample(KEY, kappa=300.0, tau=1.0, noise=0.0),
]
COEFS = [0.0, 0.03, 0.0, 0.03, 0.03, 0.03]
PATTERNS = [(2, 4), (1, 4), (4, 8)]
# Both sides compute in fp64 and differ in the order of operations: a few hundred roundings of
# 1.1e-16 on scores below 1e2.
FP64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def problem(n: int, m: int) -> tuple[Site, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Site, logits (O, C, G), weight (O, I), gradient at the masked weight (O, I), fp64."""
    site = Site(Pattern(n, m), Placement.whole(ROWS, GROUPS), CATEGORICAL)
    generator = torch.Generator().manual_seed(n * 10 + m)
    logits = 0.01 * torch.randn(
        ROWS, site.pattern.num_candidates, GROUPS, dtype=torch.float64, generator=generator
    )
    weight, grad = (
        torch.randn(ROWS, GROUPS * m, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return site, logits, weight, grad


def reference_gradient(
    site: Site,
    logits: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    draw: Sample,
    norm_coef: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W * M, gradient at the logits of sum grad W * M - coef |W * M|^2 by autograd) of the
    reference.
    """
    n, m = site.pattern.n, site.pattern.m
    gumbel = reference.gumbel(draw.key, ROWS, site.pattern.num_candidates, GROUPS)
    noise = draw.noise * gumbel
    leaf = logits.clone().requires_grad_()
    masked = weight * reference.mask(leaf, noise, n, m, draw.kappa, draw.tau, draw.hard)
    loss = (grad * masked).sum() - norm_coef * masked.square().sum()
    return masked.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(("draw", "norm_coef"), zip(DRAWS, COEFS, strict=True), ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_forward_and_backward_equal_the_reference(
    n: int, m: int, draw: Sample, norm_coef: float
) -> None:
    site, logits, weight, grad = problem(n, m)
    sink = GradientSink(norm_coef)
    expected, expected_dlogits = reference_gradient(site, logits, weight, grad, draw, norm_coef)
    masked, (norm, _), _ = gumbel_softmax.forward(logits, weight, site, draw)
    dlogits = gumbel_softmax.backward(grad, logits, weight, site, draw, sink)
    torch.testing.assert_close(masked, expected, **FP64)
    torch.testing.assert_close(norm, expected.square().sum(), **FP64)
    torch.testing.assert_close(dlogits, expected_dlogits, **FP64)
    assert float(expected_dlogits.abs().max()) > 1  # the comparison is about something

    wrong = {
        "sign": replace(draw, kappa=-draw.kappa),
        "kappa": replace(draw, kappa=1.0),
        "tau": replace(draw, tau=2.0),
        "noise": replace(draw, noise=draw.noise + 0.5),
        "step": replace(draw, key=replace(KEY, step=4)),
    }
    if draw.noise == 0:
        del wrong["step"]
    for name, other in wrong.items():
        other_dlogits = gumbel_softmax.backward(grad, logits, weight, site, other, sink)
        assert (
            other_dlogits - expected_dlogits
        ).abs().max() > 0.1 * expected_dlogits.abs().max(), f"a wrong {name} went unnoticed"


@pytest.mark.parametrize("coef", [0.0, 0.05])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_gradient_by_finite_differences(n: int, m: int, coef: float) -> None:
    site, logits, weight, grad = problem(n, m)
    draw = Sample(KEY, kappa=50.0, tau=2.0)

    def loss(at: torch.Tensor) -> torch.Tensor:
        masked, (norm, _), _ = gumbel_softmax.forward(at, weight, site, draw)
        return (grad * masked).sum() - coef * norm

    sink, step = GradientSink(coef), 1e-5
    dlogits = gumbel_softmax.backward(grad, logits, weight, site, draw, sink)
    for o, c, g in [(0, 0, 0), (2, 1, 3), (5, site.pattern.num_candidates - 1, 4)]:
        shift = torch.zeros_like(logits)
        shift[o, c, g] = step
        slope = (loss(logits + shift) - loss(logits - shift)) / (2 * step)
        # Central differences: step^2 / 6 times the third derivative, which carries (kappa / tau)^3
        # ~ 2e4, makes 3e-7 on values ~ 10; rounding of losses ~ 1e2 makes 1e-14 / 1e-5 = 1e-9.
        torch.testing.assert_close(dlogits[o, c, g], slope, rtol=1e-5, atol=1e-5)
        assert abs(dlogits[o, c, g] + slope) > 1e-3  # a wrong sign would not pass
    assert (
        dlogits.sum(1).abs().max() < 1e-10
    )  # softmax: a shift of a group's logits changes nothing


def test_autograd_sees_the_same_gradient_and_none_for_the_weight() -> None:
    site, logits, weight, grad = problem(2, 4)
    draw, sink = DRAWS[1], GradientSink(norm_coef=0.03)
    logits.requires_grad_()
    weight.requires_grad_()
    masked, (norm, _), _ = sample_mask(logits, weight, site, draw, gumbel_softmax, sink)
    assert not norm.requires_grad
    (grad * masked).sum().backward()
    assert logits.grad is not None
    plain = (logits.detach(), weight.detach(), site, draw, sink)
    assert logits.grad is not None
    assert torch.equal(logits.grad, gumbel_softmax.backward(grad, *plain))
    assert weight.grad is None


def test_weight_norm_gradient_is_that_of_minus_coef_times_the_norm() -> None:
    site, logits, weight, grad = problem(2, 4)
    draw = Sample(KEY, kappa=100.0, tau=1.0)
    noise = reference.gumbel(KEY, ROWS, 6, GROUPS)
    leaf = logits.clone().requires_grad_()
    norm = (weight * reference.mask(leaf, noise, 2, 4, draw.kappa, draw.tau)).square().sum()
    (slope,) = torch.autograd.grad(norm, leaf)
    dlogits = gumbel_softmax.backward(
        torch.zeros_like(grad), logits, weight, site, draw, GradientSink(norm_coef=0.2)
    )
    torch.testing.assert_close(dlogits, -0.2 * slope, **FP64)
    # Descent must make kept weights larger: the opposite sign is far outside the tolerance.
    stepped, *_ = gumbel_softmax.forward(logits - 1e-5 * dlogits, weight, site, draw)
    assert float(stepped.square().sum()) > float(norm.detach())


def test_hard_masks_are_legal_and_carry_the_soft_gradient() -> None:
    site, logits, weight, grad = problem(2, 4)
    soft, hard = Sample(KEY, 100.0, 2.0), Sample(KEY, 100.0, 2.0, hard=True)
    mask = gumbel_softmax.sampled_mask(logits, site, hard)
    assert is_valid(site.pattern, mask)
    assert not is_valid(site.pattern, gumbel_softmax.sampled_mask(logits, site, soft))
    # Straight-through: without the norm term the gradient does not depend on the forward value at
    # all.
    assert torch.equal(
        gumbel_softmax.backward(grad, logits, weight, site, hard),
        gumbel_softmax.backward(grad, logits, weight, site, soft),
    )


def test_soft_groups_sum_to_n() -> None:
    site, logits, _, _ = problem(4, 8)
    mask = gumbel_softmax.sampled_mask(logits, site, DRAWS[1])
    torch.testing.assert_close(
        mask.unflatten(1, (-1, 8)).sum(-1),
        torch.full((ROWS, GROUPS), 4.0, dtype=torch.float64),
        **FP64,
    )
    assert bool(((mask > 0) & (mask < 1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_end_of_the_schedules_is_finite(dtype: torch.dtype) -> None:
    site, *tensors = problem(2, 4)
    logits, weight, grad = (one.to(dtype) for one in tensors)
    draw = Sample(KEY, kappa=500.0, tau=0.05)
    for scale in (1.0, 100.0, 1e4):  # logits of std 0.01, 1, 100
        masked, (norm, _), _ = gumbel_softmax.forward(scale * logits, weight, site, draw)
        sink = GradientSink(norm_coef=0.1)
        dlogits = gumbel_softmax.backward(grad, scale * logits, weight, site, draw, sink)
        assert all(bool(torch.isfinite(one).all()) for one in (masked, norm, dlogits))


def test_statistics_are_hard_codes_and_largest_probabilities() -> None:
    site, logits, _, _ = problem(2, 4)
    hard_codes, largest = gumbel_softmax.mask_statistics(logits, site, 100.0)
    assert hard_codes.dtype == torch.uint8
    assert torch.equal(hard_codes.long(), logits.argmax(1))
    torch.testing.assert_close(largest, (100.0 * logits).softmax(1).amax(1).sum(), **FP64)
    assert abs(float(largest - (logits).softmax(1).amax(1).sum())) > 1  # kappa forgotten
