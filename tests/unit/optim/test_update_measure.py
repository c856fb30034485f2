"""What an update is made of, from gradients whose signal and noise are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask.optim.adamw import AdamW
from megamask.optim.adamw_bf16 import AdamWBf16
from megamask.optim.update_measure import averaged, measure_update, signal_share
from tests.unit.optim.lean import SEED, linear, section

ONE_RANK: Any = SimpleNamespace(sum_over_tp=lambda one: one, mean_over_dp=lambda one: one, dp=1)
SHAPES = [(64, 4, 16), (32, 4, 32)]
LOGITS = 2 * 4096


def _run(signal: float, steps: int, epsilon: float, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """The measure of the last of ``steps`` updates, whose gradients have unit mean square and a
    share ``signal`` of it in common; and the clipped gradients, (steps, logits).
    """
    torch.manual_seed(5)
    linears = [linear(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    kind: Any = AdamW if dtype == torch.float32 else AdamWBf16
    more = () if dtype == torch.float32 else (False,)
    optimizer = kind(section(betas=(0.9, 0.95), weight_decay=0.0), linears, SEED, *more, epsilon)
    common = [torch.randn(shape) * signal**0.5 for shape in SHAPES]
    seen = []
    for step in range(steps):
        grads = [one + torch.randn_like(one) * (1 - signal) ** 0.5 for one in common]
        for each, grad in zip(linears, grads, strict=True):
            each.mask_logits.main_grad = grad.to(dtype, copy=True)
        optimizer.step(step, 1e-3, torch.tensor(0.5))
        seen.append(0.5 * torch.cat([grad.flatten() for grad in grads]).double())
    return measure_update(optimizer, ONE_RANK), seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signal", [0.0, 0.1, 0.9])
def test_the_share_of_signal(signal: float, dtype: torch.dtype) -> None:
    """|m|^2 of 8,192 logits varies by sqrt(2 / 8192) = 1.6 %, and so does |g|^2: three times their
    sum is 0.09 of a share. An average that is taken for the gradient itself finds another share.
    """
    measured, _ = _run(signal, 40, 1e-8, dtype)
    assert measured.signal_share == pytest.approx(signal, abs=0.09 * max(signal, 0.1))
    if signal == 0.1:
        assert averaged(0.9, 40) > 0.05  # which would be added to the share


def test_moves_and_small_gradients_against_the_formula() -> None:
    """From the gradients alone, in fp64. The optimizer's moments are fp32 sums: 40 roundings of
    6e-8 each.
    """
    epsilon, (one, two) = 0.5, (0.9, 0.95)
    measured, seen = _run(0.1, 12, epsilon, torch.float32)
    mean = sum((1 - one) * one ** (11 - number) * grad for number, grad in enumerate(seen))
    square = sum((1 - two) * two ** (11 - number) * grad**2 for number, grad in enumerate(seen))
    root = (square / (1 - two**12)).sqrt()
    below, moves = (root < epsilon).double(), (mean / (1 - one**12)).abs() / (root + epsilon)
    assert measured.below_epsilon == pytest.approx(below.mean().item(), abs=1 / LOGITS)
    assert measured.relative_step == pytest.approx(moves.mean().item(), rel=1e-5)
    assert 0.2 < measured.below_epsilon < 0.8  # so that the side of the comparison shows
    assert measured.relative_step != pytest.approx(((mean.abs()) / root).mean().item(), rel=0.1)


def test_the_first_step_says_nothing_about_the_signal() -> None:
    assert averaged(0.9, 1) == pytest.approx(1.0, rel=1e-12)
    measured, _ = _run(0.5, 1, 1e-8, torch.float32)
    assert measured.signal_share == 0
    assert signal_share(1.0, 0.0, 0.1) == 0 and signal_share(3.0, 1.0, 0.5) == 1
