"""The operator: autograd, recomputation, gradients added in place, what it keeps and measures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import megamask
from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import GradientSink, Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask, sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.unit.sparsity.samplers import FUSED, PLAIN, AnyDistribution

ROWS, GROUPS = 6, 10
SITE = Site(
    Pattern(2, 4), Placement.shard(ROWS, GROUPS, axis=0, rank=1, size=2, stride=2), CATEGORICAL
)
SAMPLE = Sample(NoiseKey(1, 2, 3, 4), kappa=200.0, tau=0.7)
SINK = GradientSink(norm_coef=1e-3)
SAMPLERS = pytest.mark.parametrize("sampler", [PLAIN, FUSED], ids=["torch", "numba"])


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, weight and gradient at the masked weight."""
    torch.manual_seed(0)
    return (
        0.01 * torch.randn(ROWS, 6, GROUPS, dtype=dtype),
        torch.randn(ROWS, 4 * GROUPS).to(dtype),
        torch.randn(ROWS, 4 * GROUPS).to(dtype),
    )


def test_only_the_inputs_are_kept_for_the_backward() -> None:
    logits, weight, _ = problem()
    logits.requires_grad_()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sample_mask(logits, weight, SITE, SAMPLE, FUSED, SINK)
    assert kept == [logits.data_ptr(), weight.data_ptr()]


@SAMPLERS
def test_recomputation_draws_the_same(sampler: AnyDistribution) -> None:
    logits, weight, _ = problem()
    gradients: list[torch.Tensor] = []
    for recompute in (False, True):
        pi = logits.clone().requires_grad_()

        def layer(one: torch.Tensor) -> torch.Tensor:
            masked = sample_mask(one, weight, SITE, SAMPLE, sampler, SINK).masked
            return masked.square().sum()

        (checkpoint(layer, pi, use_reentrant=False) if recompute else layer(pi)).backward()
        assert pi.grad is not None
        gradients.append(pi.grad)
    plain, recomputed = gradients
    assert torch.equal(plain, recomputed)


@SAMPLERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_can_be_added_where_they_are_collected(
    sampler: AnyDistribution, dtype: torch.dtype
) -> None:
    logits, weight, grad = problem()
    expected = gumbel_softmax.backward(grad, logits, weight, SITE, SAMPLE, SINK)
    logits.requires_grad_()
    buffer = torch.ones(logits.shape, dtype=dtype)
    sink = replace(SINK, buffer=buffer)
    for _ in range(2):
        sample_mask(logits, weight, SITE, SAMPLE, sampler, sink).masked.backward(grad)
    assert logits.grad is None
    # two roundings to bf16 (2^-9 of a value up to 1 + 2 max), or fp32's 2^-24 and the two ways to
    # take logs (test_backends.py)
    bound = (2.0**-8 if dtype == torch.bfloat16 else 1e-4) * float(1 + 2 * expected.abs().max())
    assert float((buffer.float() - 1 - 2 * expected).abs().max()) < bound
    assert float((buffer.float() - 1 - expected).abs().max()) > bound, "adding once would pass"
    fresh = replace(sink, replace=True)
    sample_mask(logits, weight, SITE, SAMPLE, sampler, fresh).masked.backward(grad)
    assert float((buffer.float() - expected).abs().max()) < bound, "replaces the old gradient"


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_for_a_fixed_sample_the_gradient_is_linear_in_that_of_the_masked_weight(hard: bool) -> None:
    """What lets one sample serve a step: sum the dW of its micro-batches, run the mask backward
    once. fp64.
    """
    logits, weight, _ = problem(torch.float64)
    grads = [torch.randn(weight.shape, dtype=torch.float64) for _ in range(5)]
    sample, each, whole = replace(SAMPLE, hard=hard), GradientSink(1e-3 / 5), GradientSink(1e-3)
    one_by_one = sum(
        gumbel_softmax.backward(grad, logits, weight, SITE, sample, each) for grad in grads
    )
    total = torch.stack(grads).sum(0)
    once = gumbel_softmax.backward(total, logits, weight, SITE, sample, whole)
    # fp64 rounds at 1e-16, sums of 5 x 4 terms
    assert float((once - one_by_one).abs().max()) < 1e-12 * float(once.abs().max())
    other = replace(sample, key=replace(SAMPLE.key, micro_batch=9))
    several = sum(
        gumbel_softmax.backward(grad, logits, weight, SITE, one, each)
        for grad, one in zip(grads, [sample, *[other] * 4], strict=True)
    )
    assert float((once - several).abs().max()) > 1e-3 * float(once.abs().max()), (
        "other samples give another sum"
    )


@SAMPLERS
def test_statistics_of_the_pass_are_those_taken_alone(sampler: AnyDistribution) -> None:
    logits, weight, _ = problem()
    seen = sample_mask(logits, weight, SITE, SAMPLE, sampler, statistics=True)
    hard_codes, largest = gumbel_softmax.mask_statistics(logits, SITE, SAMPLE.kappa)
    assert torch.equal(seen.hard_codes, hard_codes)
    # fp32 softmax of 60 groups, summed in fp64
    assert float(seen.sums[1]) == pytest.approx(float(largest), rel=1e-6)
    squares = float(seen.masked.double().square().sum())
    assert float(seen.sums[0]) == pytest.approx(squares, rel=1e-6)
    blind = sample_mask(logits, weight, SITE, SAMPLE, sampler)
    assert blind.hard_codes.numel() == 0 and float(blind.sums[1]) == 0
    assert torch.equal(blind.masked, seen.masked)


@SAMPLERS
def test_logits_may_be_stored_in_bf16(sampler: AnyDistribution) -> None:
    logits, weight, grad = problem()
    small = logits.bfloat16()
    masked = sample_mask(small, weight, SITE, SAMPLE, sampler).masked
    assert torch.equal(masked, sample_mask(small.float(), weight, SITE, SAMPLE, sampler).masked)
    assert not torch.equal(masked, sample_mask(logits, weight, SITE, SAMPLE, sampler).masked)
    trained = small.requires_grad_()
    sample_mask(trained, weight, SITE, SAMPLE, sampler).masked.backward(grad)
    assert trained.grad is not None and trained.grad.dtype == torch.bfloat16


def test_a_step_runs_through_three_files() -> None:
    """What a reader has to follow from the masked linear to the kernels."""
    logits, weight, grad = problem()
    sampler, buffer = sampler_for("numba", SITE.distribution), torch.zeros_like(logits)
    sink, seen = GradientSink(1e-3, buffer), set()
    logits.requires_grad_()

    package = Path(megamask.__file__).parent

    def step(number: int) -> None:
        sample = Sample(NoiseKey(1, number), 200.0, 0.7).of(4)
        sample_mask(logits, weight, SITE, sample, sampler, sink, True).masked.backward(grad)

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and package in path.parents:
            seen.add(path.name)

    step(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.setprofile(note)
    try:
        step(1)
    finally:
        sys.setprofile(None)
        torch.set_num_threads(threads)
    # and the file of the compiled kernels
    assert seen == {"operator.py", "draw.py", "numba_host.py", "gumbel_softmax_numba.py"}
