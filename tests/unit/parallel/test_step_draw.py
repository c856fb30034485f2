"""One draw for a whole step: the same bits whether the layers are drawn in turn or side by side,
and noted in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from megamask.config import Config
from megamask.parallel.mask_context import MaskSwitch
from megamask.parallel.masked_linear import MaskedColumnParallelLinear
from megamask.parallel.mesh import start
from megamask.parallel.step_draw import StepDraws
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import GradientSink, Sample
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern

SIZES = [(8, 24), (64, 256), (16, 12), (32, 128), (8, 8)]  # (O, I): the second takes longest
SAMPLE = Sample(NoiseKey(3, 1), kappa=100.0, tau=1.0)
COEF = 1e-3


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    with start(Config.model_validate({"device": "cpu", "parallel": {"threads": request.param}})):
        yield request.param
    torch.set_num_threads(before)


def layers(backend: str) -> list[Any]:
    """Linears with random bf16 weights and logits, and room for the gradient at the logits."""
    settings, switch, made = (
        ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
        MaskSwitch(),
        [],
    )
    for number, (rows, columns) in enumerate(SIZES):
        linear = MaskedColumnParallelLinear(
            columns,
            rows,
            config=settings,
            init_method=torch.nn.init.zeros_,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
        )
        noise = torch.Generator().manual_seed(number)
        linear.weight.data = torch.randn(rows, columns, generator=noise).bfloat16()
        linear.requires_grad_(False)
        linear.attach_logits(
            linear.make_site(Pattern(2, 4), "x", CATEGORICAL), 10 - number, switch, backend
        )
        logits: Any = linear.mask_logits
        logits.data.normal_(std=0.01, generator=noise)
        # replaced, not added to
        logits.main_grad = torch.full_like(logits, float("nan"), requires_grad=False)
        made.append(linear)
    return made


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_step_of_all_layers_is_that_of_each(backend: str, threads: int) -> None:
    linears = layers(backend)
    draws = StepDraws(linears)
    measured = draws.begin(SAMPLE, COEF, sums_in_fp32=True)
    assert list(measured) == [10 - number for number in range(len(SIZES))]
    drawn = [linear.step_weight.detach().clone() for linear in linears]
    for micro_batch in range(2):
        sum(
            (linear(torch.ones(2, 1, linear.weight.shape[1]).bfloat16())[0] * (1 + micro_batch))
            .float()
            .sum()
            for linear in linears
        ).backward()
    assert list(draws.end()) == list(range(len(SIZES)))

    for linear, masked, weight_sum in zip(linears, drawn, draws.buffers, strict=True):
        own = SAMPLE.of(linear.parameter_id)
        alone = linear.sampler.forward(
            linear.mask_logits.detach(), linear.weight, linear.site, own, statistics=True
        )
        assert torch.equal(alone.masked, masked)
        found = measured[linear.parameter_id]
        assert torch.equal(alone.sums, torch.stack([found.norm, found.largest]))
        assert torch.equal(alone.hard_codes, found.hard_codes)
        weight_grad = torch.full(
            masked.shape, 2.0 + 4.0
        )  # two rows of ones, once weighed 1 and once 2
        assert torch.equal(weight_sum, weight_grad)
        expected = linear.sampler.backward(
            weight_grad,
            linear.mask_logits.detach(),
            linear.weight,
            linear.site,
            own,
            GradientSink(COEF),
        )
        assert torch.equal(linear.mask_logits.main_grad, expected)
    draws.drop()
    assert all(linear.step_weight is None for linear in linears)
