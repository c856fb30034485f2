"""Masked linears in one process: dense, sampled, folded; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.parallel.mask_context import MaskSwitch, RunningSample
from megamask.parallel.masked_linear import MaskedColumnParallelLinear, MaskedRowParallelLinear
from megamask.parallel.mesh import start
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern

PATTERN = Pattern(2, 4)


@pytest.fixture(params=(MaskedColumnParallelLinear, MaskedRowParallelLinear))
def linear(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A linear of 12 inputs and 8 outputs with random weight and zero logits."""
    settings = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)
    extra = (
        {"input_is_parallel": True}
        if request.param is MaskedRowParallelLinear
        else {"gather_output": False}
    )
    with start(Config.model_validate({"device": "cpu", "parallel": {"threads": 1}})):
        made = request.param(
            12,
            8,
            config=settings,
            init_method=torch.nn.init.zeros_,
            bias=False,
            skip_bias_add=False,
            **extra,
        )
        made.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        made.requires_grad_(False)
        yield made


def attach(linear: Any) -> MaskSwitch:
    switch = MaskSwitch()
    linear.attach_logits(linear.make_site(PATTERN, "x", CATEGORICAL), 7, switch, "torch")
    linear.mask_logits.data.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    return switch


def test_dense_sampled_and_folded(linear: Any) -> None:
    x = torch.randn(3, 1, 12, generator=torch.Generator().manual_seed(2))
    dense, _ = linear(x)
    torch.testing.assert_close(dense, x @ linear.weight.T)  # fp32 sums of 12 terms
    switch = attach(linear)
    assert torch.equal(linear(x)[0], dense)  # no draw is set

    running = switch.running = RunningSample(Sample(NoiseKey(1, 2), 100.0, 1.0, hard=True))
    sampled = linear.masked_weight(linear.weight)
    assert torch.equal(sampled != 0, PATTERN.mask_of(PATTERN.index_of((sampled != 0).int())))
    assert torch.equal(linear(x)[0], linear(x)[0])  # the same draw again
    assert not torch.equal(linear(x)[0], dense)
    assert float(running.measured[7].norm) == pytest.approx(
        float(sampled.detach().double().square().sum())
    )

    switch.running = None
    hard_codes = linear.hard_mask()
    assert torch.equal(PATTERN.index_of(hard_codes), linear.mask_logits.argmax(1))
    linear.fold(hard_codes)
    torch.testing.assert_close(linear(x)[0], x @ (linear.weight * hard_codes).T)
    assert not bool(
        linear.folded_weight[~hard_codes].signbit().any()
    )  # +0.0, also where the weight is negative
    linear.fold(None)
    assert torch.equal(linear(x)[0], dense)


def test_only_logits_are_new_parameters_and_they_are_marked_as_sharded(linear: Any) -> None:
    attach(linear)
    assert [name for name, parameter in linear.named_parameters() if parameter.requires_grad] == [
        "mask_logits"
    ]
    logits = linear.mask_logits
    assert logits.shape == (8, 6, 3)
    assert logits.tensor_model_parallel
    assert (
        logits.partition_dim
        == linear.logits_axis
        == (0 if isinstance(linear, MaskedColumnParallelLinear) else 2)
    )


def test_rows_that_m_does_not_divide_are_refused(linear: Any) -> None:
    with pytest.raises(ConfigError, match="in_features of layer.x"):
        linear.make_site(Pattern(2, 5), "layer.x", CATEGORICAL)
