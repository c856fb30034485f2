"""Lion against the paper's update in fp64; what stochastic rounding and 8 bits do to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamask.optim.lion import Lion
from megamask.optim.lion_8bit import BLOCK, Lion8bit, dequantize
from tests.unit.optim.lean import (
    BETAS,
    SEED,
    linear,
    neighbours,
    random_grad,
    random_logits,
    same_bits,
    section,
    take_step,
)

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16)]  # of logits and gradients
RATE, DECAY = 3e-4, 0.1


def paper(
    p: torch.Tensor, m: torch.Tensor, g: torch.Tensor, betas: tuple[float, float] = BETAS
) -> tuple[torch.Tensor, ...]:
    """Chen et al. (2023), Alg. 2, in fp64: (new p, new m, the update before its sign)."""
    p, m, g = p.double(), m.double(), g.double()
    update = betas[0] * m + (1 - betas[0]) * g
    return p - RATE * (update.sign() + DECAY * p), betas[1] * m + (1 - betas[1]) * g, update


# Four fp32 operations of 2^-24 each on numbers that add up without much cancellation; where they
# cancel the bound is absolute.
ROUNDING, TINY = 4e-7, 1e-10


def is_lion(
    before: Any, after: Any, grad: torch.Tensor, betas: tuple[float, float] = BETAS
) -> bool:
    """Whether (logits, momentum) moved as the paper says, up to one rounding to a neighbouring bf16
    where they are bf16.
    """
    (p, m), (new_p, new_m) = before, after
    expected_p, expected_m, update = paper(p, m, grad, betas)
    sure = update.abs() > TINY
    low, high = neighbours(expected_m, ROUNDING)
    fits = ((new_m.abs() >= low.abs()) & (new_m.abs() <= high.abs())) | (
        (new_m - expected_m).abs() < TINY
    )
    if new_p.dtype == BF16:
        low, high = neighbours(expected_p, ROUNDING)
        good = ((new_p.abs() >= low.abs()) & (new_p.abs() <= high.abs())) | (
            (new_p - expected_p).abs() < TINY
        )
    else:
        good = (new_p - expected_p).abs() <= ROUNDING * expected_p.abs() + TINY
    return bool(fits.all()) and bool(good[sure].all()) and float(sure.float().mean()) > 0.99


@pytest.mark.parametrize(("logits", "grads"), DTYPES)
@pytest.mark.parametrize("numba", [True, False])
def test_every_step_is_the_papers(logits: torch.dtype, grads: torch.dtype, numba: bool) -> None:
    ours = Lion(section(), [linear(random_logits(dtype=logits))], SEED, numba)
    (p,), ((m,),) = ours.logits, ours.state
    for step in range(4):
        grad, before = random_grad(step, p, grads), (p.detach().clone(), m.clone())
        take_step(ours, step, [grad], RATE)
        assert is_lion(before, (p.detach(), m), grad)
    assert not is_lion(before, (p.detach(), m), grad, betas=BETAS[::-1])
    assert not is_lion(before, (p.detach(), m), -grad)


# ---- stochastic rounding


def test_plain_bf16_loses_small_updates_and_stochastic_rounding_does_not() -> None:
    """200 steps of 1e-5 from 0.05, whose neighbours in bf16 are 2.4e-4 away."""
    rate, steps, count = 1e-5, 200, 4096
    exact = 0.05 - rate * steps
    plain = torch.full((count,), 0.05, dtype=BF16)
    rounded = linear(torch.full((16, 4, count // 64), 0.05, dtype=BF16))
    lion = Lion(section(weight_decay=0.0), [rounded], SEED, True)
    for step in range(steps):
        plain -= rate
        take_step(lion, step, [torch.ones_like(rounded.mask_logits, dtype=FP32)], rate)
    assert float(plain[0]) == float(torch.tensor(0.05, dtype=BF16)), (
        "plain bf16 moved: the test shows nothing"
    )
    found = rounded.mask_logits.detach().double()
    start_error = float(torch.tensor(0.05, dtype=BF16)) - 0.05
    # The mean of `count` independent roundings: five of its own standard errors.
    assert (
        abs(float(found.mean()) - start_error - exact) < 5 * float(found.std()) / count**0.5 + 1e-8
    )
    assert float(found.std()) > 1e-5


def test_eight_bit_momentum_follows_the_exact_one() -> None:
    start = random_logits(64, 64)
    ours = Lion8bit(section(), [linear(start)], SEED, True)
    exact = torch.zeros_like(start, dtype=torch.float64)
    for step in range(60):
        grad = random_grad(step, start) + 0.002
        take_step(ours, step, [grad])
        exact = BETAS[1] * exact + (1 - BETAS[1]) * grad.double()
    error = dequantize(*ours.state[0]).double() - exact
    largest = (
        exact.abs()
        .amax(1, keepdim=True)
        .unflatten(2, (-1, BLOCK))
        .amax(3)
        .repeat_interleave(BLOCK, 2)
    )
    # A step of the code is 1/127 to 1/64 of the block's largest; each update adds a rounding of at
    # most half its std (variance 1/4 step^2) and forgets 1 %: after n steps the error's std is at
    # most half a step times sqrt((1 - 0.99^2n) / (1 - 0.99^2)) = 4.2 steps here.
    assert float((error / largest).std()) < 0.5 / 64 * 5.9
    assert (
        abs(float(error.mean())) < 5 * float(error.std()) / error.numel() ** 0.5 * 2
    )  # the errors of a block are nearly independent
    assert float(exact.mean()) > 20 * abs(float(error.mean()))


def test_tiny_and_zero_momentum() -> None:
    start = random_logits(8, 16)
    for size in (0.0, 1e-42, 1e-38, 1e30):
        ours = [Lion8bit(section(), [linear(start)], SEED, numba) for numba in (True, False)]
        for one in ours:
            take_step(one, 0, [torch.full_like(start, size)])
        assert same_bits(*ours)
        value = dequantize(*ours[0].state[0])
        assert bool(value.isfinite().all())
        assert bool(((value - 0.01 * size).abs() <= 0.01 * size / 64 + 2.0**-126).all())
