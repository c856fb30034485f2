"""AdamW with 16-bit state against AdamW in fp64: every step, and the mean of many runs; what
rounding to nearest would lose.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megamask.optim.adamw_bf16 import AdamWBf16
from tests.unit.optim.lean import (
    SEED,
    linear,
    neighbours,
    random_grad,
    random_logits,
    section,
    take_step,
)

BF16, FP32 = torch.bfloat16, torch.float32
RATE, DECAY, EPS = 3e-4, 1.0, 1e-8
# Ten fp32 operations of 2^-24 each; where decay and update cancel against the logit the bound is
# absolute (of an update of 3e-4).
ROUNDING, TINY = 6e-7, 2e-10

Numbers = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # logits, mean and mean square of their gradients


@dataclass
class Paper:
    """Loshchilov and Hutter (2019), Alg. 2, in fp64."""

    betas: tuple[float, float] = (0.9, 0.95)
    rate: float = RATE
    decay: float = DECAY
    is_corrected: bool = True

    def step(
        self, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, t: int
    ) -> Numbers:
        """Logits and moments after update ``t``, counted from 1."""
        (one, two), g = self.betas, grad.double()
        m, v = one * m.double() + (1 - one) * g, two * v.double() + (1 - two) * g * g
        corrections = (1 - one**t, 1 - two**t) if self.is_corrected else (1.0, 1.0)
        direction = (m / corrections[0]) / ((v / corrections[1]).sqrt() + EPS)
        return p.double() - self.rate * direction - self.rate * self.decay * p.double(), m, v


def is_next_to(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether every bf16 is one of the two neighbours of the exact value."""
    low, high = neighbours(exact, ROUNDING)
    fits = ((found.abs() >= low.abs()) & (found.abs() <= high.abs())) | (
        (found - exact).abs() < TINY
    )
    return bool(fits.all())


@pytest.mark.parametrize("grads", [FP32, BF16])
@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_every_step_is_the_papers(
    grads: torch.dtype, numba: bool, betas: tuple[float, float]
) -> None:
    ours = AdamWBf16(
        section("adamw", betas=betas, weight_decay=DECAY),
        [linear(random_logits(dtype=BF16))],
        SEED,
        numba,
    )
    (p,), ((m, v),) = ours.logits, ours.state
    for step in range(5):
        grad, before = random_grad(step, p, grads), (p.detach().clone(), m.clone(), v.clone())
        take_step(ours, step, [grad], RATE)
        exact = Paper(betas).step(*before, grad, step + 1)
        assert all(
            is_next_to(found, one) for found, one in zip((p.detach(), m, v), exact, strict=True)
        )
    assert ours.steps_done() == 5
    for wrong in (
        Paper(betas, is_corrected=False),
        Paper(betas, decay=0.0),
        Paper(betas, rate=0.9 * RATE),
    ):
        assert not is_next_to(p.detach(), wrong.step(*before, grad, 5)[0])
    assert not is_next_to(p.detach(), Paper(betas).step(*before, grad, 4)[0])
    assert not is_next_to(v, Paper(betas).step(*before, -grad, 5)[1])


def copies(values: list[float], count: int) -> torch.Tensor:
    """(8, candidates, count / 8): every candidate its value, ``count`` times. The noise differs
    from group to group.
    """
    return (
        torch.tensor(values, dtype=FP32)[None, :, None]
        .expand(8, len(values), count // 8)
        .contiguous()
    )


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_the_mean_of_many_runs_is_exact_adamw(betas: tuple[float, float]) -> None:
    """100 steps of noisy gradients of four sizes; 8,192 runs side by side that differ in their
    roundings alone.
    """
    steps, count, sizes = 100, 8192, torch.tensor([1.0, 1e-2, 1e-5, 1e-8])
    start = copies([0.03, -0.01, 0.02, 0.0], count).to(BF16)
    ours = AdamWBf16(section("adamw", betas=betas, weight_decay=DECAY), [linear(start)], SEED, True)
    logits = ours.logits[0].detach()
    exact: Numbers = (logits[0, :, 0].double(), torch.zeros(4), torch.zeros(4))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        grad = sizes * (0.3 + torch.randn(4, generator=generator))
        take_step(ours, step, [copies(grad.tolist(), count)], RATE)
        exact = Paper(betas).step(*exact, grad, step + 1)
    for found, expected in zip((logits, *ours.state[0]), exact, strict=True):
        found = found.double()
        # Five standard errors of the mean. A rounding of v by up to 2^-8 of it moves the mean of 1
        # / sqrt(v) by 3/8 of its variance: 1e-5.
        allowed = 5 * found.std((0, 2)) / count**0.5 + 2e-5 * expected.abs()
        assert bool(((found.mean((0, 2)) - expected).abs() <= allowed).all())
        assert bool((found.std((0, 2)) > 0).all())
        assert bool(((found.mean((0, 2)) - 1.01 * expected).abs() > allowed).all()), (
            "an error of 1 % would not be seen"
        )


def test_rounding_to_nearest_loses_updates_and_forgets_nothing() -> None:
    """Why stochastic: 300 steps at 1e-5, whose second half has gradients a tenth as large."""
    paper, count = Paper((0.9, 0.999), rate=1e-5, decay=0.0), 16384
    ours = AdamWBf16(
        section("adamw", betas=paper.betas, weight_decay=0.0),
        [linear(copies([0.05], count).to(BF16))],
        SEED,
        True,
    )
    start, zero = ours.logits[0][0, :, 0].detach().clone(), torch.zeros(1)
    exact: Numbers = (start.double(), zero, zero)
    nearest: Numbers = (start, zero, zero)
    for step in range(300):
        size = 1e-2 if step < 150 else 1e-3
        take_step(ours, step, [copies([size], count)], paper.rate)
        exact = paper.step(*exact, torch.tensor([size]), step + 1)
        p, m, v = paper.step(*nearest, torch.tensor([size]), step + 1)
        nearest = (p.bfloat16(), m.bfloat16(), v.bfloat16())
    # A step of 0.04 of bf16's spacing rounds up with that probability: the mean of 16,384 sums of
    # 300 such steps has a std of 0.3 %.
    assert float(
        (ours.logits[0].detach().double().mean() - start.double()) / (exact[0] - start.double())
    ) == pytest.approx(1, abs=0.015)
    assert float(ours.state[0][1].double().mean() / exact[2]) == pytest.approx(1, abs=0.01)
    assert torch.equal(nearest[0], start), "nearest rounding moved: the test shows nothing"
    assert abs(float(nearest[2] / exact[2]) - 1) > 0.05


def test_zero_gradients_change_nothing_but_the_decay() -> None:
    start = random_logits(dtype=BF16)
    for decay in (0.0, DECAY):
        ours = AdamWBf16(section("adamw", weight_decay=decay), [linear(start)], SEED, True)
        take_step(ours, 0, [torch.zeros_like(start)])
        assert torch.equal(ours.logits[0].detach(), start) == (decay == 0)
        assert all(not bool(one.any()) for one in ours.state_tensors())


def test_a_resume_needs_the_count_of_updates() -> None:
    start = random_logits(dtype=BF16)
    ours = AdamWBf16(section("adamw"), [linear(start)], SEED, True)
    for step in range(3):
        take_step(ours, step, [random_grad(step, start)])
    saved = {name: [one.clone() for one in ones] for name, ones in ours.moments().items()}
    right, wrong = (
        AdamWBf16(section("adamw"), [linear(ours.logits[0].detach())], SEED, True) for _ in range(2)
    )
    right.load_moments(saved, ours.steps_done())
    wrong.load_moments(saved, 0)
    for one in (ours, right, wrong):
        take_step(one, 3, [random_grad(3, start)])
    assert torch.equal(ours.logits[0], right.logits[0]) and right.steps_done() == 4
    assert not torch.equal(ours.logits[0], wrong.logits[0])
