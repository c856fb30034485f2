"""The custom op: schema, fake tensors, autograd, torch.compile, recomputation, gradients added in
place, what it keeps and watches.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.draw import Draw, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import _numbers, sample_mask
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

ROWS, GROUPS = 6, 10
SITE = Site(Pattern(2, 4), Placement.shard(ROWS, GROUPS, axis=0, rank=1, size=2, stride=2))
DRAW = Draw(NoiseKey(1, 2, 3, 4), kappa=200.0, tau=0.7, norm_coef=1e-3, watch=True)
BACKENDS = ["torch", "numba"]


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, weight and gradient at the masked weight."""
    torch.manual_seed(0)
    return (
        0.01 * torch.randn(ROWS, 6, GROUPS, dtype=dtype),
        torch.randn(ROWS, 4 * GROUPS).to(dtype),
        torch.randn(ROWS, 4 * GROUPS).to(dtype),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorch_finds_nothing_wrong_with_the_ops(backend: str) -> None:
    logits, weight, grad = problem()
    site, key, scale, hard, watch, fresh = _numbers(SITE, DRAW)
    ops = torch.ops.megamask
    trained = logits.clone().requires_grad_()
    torch.library.opcheck(
        ops.sample_mask.default,
        (trained, weight, None, site, key, scale, hard, watch, fresh, backend),
    )
    backward = (grad, logits, weight, site, key, scale, hard)
    torch.library.opcheck(ops.sample_mask_backward.default, (*backward, backend))
    torch.library.opcheck(
        ops.sample_mask_backward_.default, (torch.zeros_like(logits), *backward, fresh, backend)
    )


def test_fake_tensors_have_the_real_shapes() -> None:
    logits, weight, _ = problem(torch.bfloat16)
    for draw in (DRAW, replace(DRAW, watch=False)):
        real = sample_mask(logits, weight, SITE, draw, "torch")
        with FakeTensorMode() as mode:
            inputs = (mode.from_tensor(logits), mode.from_tensor(weight))
            fake = torch.ops.megamask.sample_mask(*inputs, None, *_numbers(SITE, draw), "torch")
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (
                other.shape,
                other.dtype,
                other.stride(),
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_gives_the_same_and_is_not_compiled_for_every_step(backend: str) -> None:
    logits, weight, grad = problem()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    def layer(x: torch.Tensor, pi: torch.Tensor, step: int, tau: float) -> torch.Tensor:
        draw = replace(DRAW, key=replace(DRAW.key, step=step), tau=tau)
        return x @ sample_mask(pi, weight, SITE, draw, backend).masked.T

    x, compiled = (
        torch.randn(3, 4 * GROUPS),
        torch.compile(layer, backend="aot_eager", fullgraph=True),
    )
    torch._dynamo.reset()
    for step in range(6):
        results = []
        for function in (layer, compiled):
            pi = logits.clone().requires_grad_()
            y = function(x, pi, step, 4.0 - 0.5 * step)
            y.backward(torch.ones_like(y))
            results.append((y.detach(), pi.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(
            results[0][1], results[1][1]
        )
    torch._dynamo.reset()
    counting = torch.compile(layer, backend=count, fullgraph=True)
    for step in range(6):
        counting(x, logits, step, 4.0 - 0.5 * step)
    assert len(graphs) <= 3, "step and tau must not be baked into the graph"


def test_only_the_inputs_are_kept_for_the_backward() -> None:
    logits, weight, _ = problem()
    logits.requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        sample_mask(logits, weight, SITE, DRAW, "numba")
    assert kept == [logits.data_ptr(), weight.data_ptr()]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        torch.ops.megamask.sample_mask(logits, weight, None, *_numbers(SITE, DRAW), "numba")
    assert kept == [logits.numel(), weight.numel(), 3], (
        "logits, weight, and the three numbers of the draw"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_draws_the_same(backend: str) -> None:
    logits, weight, _ = problem()
    gradients = []
    for recompute in (False, True):
        pi = logits.clone().requires_grad_()

        def layer(one: torch.Tensor) -> torch.Tensor:
            return sample_mask(one, weight, SITE, DRAW, backend).masked.square().sum()

        (checkpoint(layer, pi, use_reentrant=False) if recompute else layer(pi)).backward()
        gradients.append(pi.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_can_be_added_where_they_are_collected(backend: str, dtype: torch.dtype) -> None:
    logits, weight, grad = problem()
    expected = gumbel_softmax.backward(grad, logits, weight, SITE, DRAW)
    logits.requires_grad_()
    into = torch.ones(logits.shape, dtype=dtype)
    for _ in range(2):
        sample_mask(logits, weight, SITE, DRAW, backend, into).masked.backward(grad)
    assert logits.grad is None
    # two roundings to bf16 (2^-9 of a value up to 1 + 2 max), or fp32's 2^-24 and the two ways to
    # take logs (test_backends.py)
    bound = (2.0**-8 if dtype == torch.bfloat16 else 1e-4) * float(1 + 2 * expected.abs().max())
    assert float((into.float() - 1 - 2 * expected).abs().max()) < bound
    assert float((into.float() - 1 - expected).abs().max()) > bound, "adding once would have passed"
    sample_mask(logits, weight, SITE, replace(DRAW, fresh=True), backend, into).masked.backward(
        grad
    )
    assert float((into.float() - expected).abs().max()) < bound, "a fresh gradient replaces the old"


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_for_a_fixed_draw_the_gradient_is_linear_in_that_of_the_masked_weight(hard: bool) -> None:
    """What lets one draw serve a step: sum the dW of its micro-batches, run the mask backward once.
    fp64.
    """
    logits, weight, _ = problem(torch.float64)
    grads = [torch.randn(weight.shape, dtype=torch.float64) for _ in range(5)]
    each = replace(DRAW, hard=hard, norm_coef=1e-3 / len(grads))
    one_by_one = sum(gumbel_softmax.backward(grad, logits, weight, SITE, each) for grad in grads)
    once = gumbel_softmax.backward(sum(grads), logits, weight, SITE, replace(each, norm_coef=1e-3))  # type: ignore[arg-type]
    assert float((once - one_by_one).abs().max()) < 1e-12 * float(
        once.abs().max()
    )  # fp64 rounds at 1e-16, sums of 5 x 4 terms
    other = replace(each, key=replace(DRAW.key, micro_batch=9))
    several = sum(
        gumbel_softmax.backward(grad, logits, weight, SITE, draw)
        for grad, draw in zip(grads, [each, *[other] * 4], strict=True)
    )
    assert float((once - several).abs().max()) > 1e-3 * float(once.abs().max()), (
        "fresh draws are another sum"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_pass_watches_is_what_a_survey_sees(backend: str) -> None:
    logits, weight, _ = problem()
    seen = sample_mask(logits, weight, SITE, DRAW, backend)
    hard_codes, largest = gumbel_softmax.mask_statistics(logits, SITE, DRAW.kappa)
    assert torch.equal(seen.hard_codes, hard_codes)
    assert float(seen.sums[1]) == pytest.approx(
        float(largest), rel=1e-6
    )  # fp32 softmax of 60 groups, summed in fp64
    assert float(seen.sums[0]) == pytest.approx(
        float(seen.masked.double().square().sum()), rel=1e-6
    )
    blind = sample_mask(logits, weight, SITE, replace(DRAW, watch=False), backend)
    assert (
        blind.hard_codes.numel() == 0
        and float(blind.sums[1]) == 0
        and torch.equal(blind.masked, seen.masked)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_be_stored_in_bf16(backend: str) -> None:
    logits, weight, grad = problem()
    small = logits.bfloat16()
    masked = sample_mask(small, weight, SITE, DRAW, backend).masked
    assert torch.equal(masked, sample_mask(small.float(), weight, SITE, DRAW, backend).masked)
    assert not torch.equal(masked, sample_mask(logits, weight, SITE, DRAW, backend).masked)
    trained = small.requires_grad_()
    sample_mask(trained, weight, SITE, DRAW, backend).masked.backward(grad)
    assert trained.grad is not None and trained.grad.dtype == torch.bfloat16
