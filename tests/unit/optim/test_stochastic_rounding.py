"""What the update rules with stochastic rounding share: kernels that give the bits of PyTorch,
unbiased rounding, layouts, snapshots.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamask.optim.adamw_bf16 import AdamWBf16
from megamask.optim.lion import Lion
from megamask.optim.lion_8bit import Lion8bit
from megamask.optim.stochastic_rounding import RoundingOptimizer, round_stochastically
from megamask.sparsity import noise
from megamask.sparsity.shard import Placement, RowBlock
from tests.unit.optim.lean import (
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
KINDS: list[type[RoundingOptimizer]] = [AdamWBf16, Lion, Lion8bit]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("logits", "grads"), DTYPES)
@pytest.mark.parametrize("groups", [40, 43])
def test_kernels_give_the_bits_of_pytorch(
    kind: type[RoundingOptimizer], logits: torch.dtype, grads: torch.dtype, groups: int
) -> None:
    start, threads = random_logits(groups=groups, dtype=logits), torch.get_num_threads()
    plain, fused = (kind(section(), [linear(start)], SEED, numba) for numba in (False, True))
    try:
        torch.set_num_threads(3)
        for step in range(4):
            for one in (plain, fused):
                take_step(one, step, [random_grad(step, start, grads)], clip=0.3)
    finally:
        torch.set_num_threads(threads)
    assert same_bits(plain, fused)
    take_step(fused, 5, [random_grad(5, start, grads)])
    assert not same_bits(plain, fused)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_factor_is_a_smaller_gradient(kind: type[RoundingOptimizer]) -> None:
    start = random_logits()
    grad = random_grad(0, start)
    ours, theirs = (kind(section(), [linear(start)], SEED, True) for _ in range(2))
    take_step(ours, 0, [grad], clip=0.25)
    take_step(theirs, 0, [0.25 * grad])  # a power of two: exact
    assert same_bits(ours, theirs)


# ---- stochastic rounding


def test_rounding_is_unbiased_and_leaves_representable_values_alone() -> None:
    noise = torch.arange(
        2**16
    )  # every value once: the mean is exact but for one part in 2^16 of a bf16 step
    for value in (1.0, -3.140625, 0.123456, -7.654321e-5):
        rounded = round_stochastically(torch.full((2**16,), value), noise).double()
        exact = torch.tensor(value, dtype=FP32).double()
        step = float(2.0 ** (torch.floor(torch.log2(exact.abs())) - 7))
        assert abs(float(rounded.mean() - exact)) <= step * 2.0**-16
        assert set(rounded.unique().tolist()) <= {float(one) for one in neighbours(exact)}


@pytest.mark.parametrize("kind", [AdamWBf16, Lion])
@pytest.mark.parametrize("numba", [True, False])
def test_a_gradient_that_is_nan_shows(kind: type[RoundingOptimizer], numba: bool) -> None:
    """CUDA's NaN has all bits set: with any noise they would overflow, to a moment of 0."""
    start = random_logits(2, 8, BF16)
    one, grad = kind(section(), [linear(start)], SEED, numba), random_grad(0, start)
    grad.view(torch.int32)[1, 2, 3] = 0x7FFFFFFF
    take_step(one, 0, [grad])
    for moment in one.state[0]:
        assert torch.equal(moment.isnan(), grad.isnan()) and bool(moment[1, 2, 3].isnan())


def test_one_word_rounds_three_numbers_independently_in_pairs() -> None:
    """Errors of three roundings as AdamW makes them: means and covariances of independent ones."""
    word = noise.words(noise.NoiseKey(1, 2, 3, 4), torch.arange(2**16), 4).flatten()
    noises = (word & 0xFFFF, word >> 16, (word ^ (word >> 16)) & 0xFFFF)
    values = [torch.full(word.shape, value) for value in (0.123456, -7.654321e-5, 3.3333e-3)]
    errors = torch.stack(
        [
            (round_stochastically(v, n).double() - v.double())
            for v, n in zip(values, noises, strict=True)
        ]
    )
    sure = 5 / word.numel() ** 0.5  # five standard errors
    assert bool((errors.mean(1).abs() < sure * errors.std(1)).all())
    assert float((torch.corrcoef(errors) - torch.eye(3)).abs().max()) < sure
    same_noise = torch.stack(
        [errors[0], round_stochastically(values[1], noises[0]).double() - values[1].double()]
    )
    assert abs(float(torch.corrcoef(same_noise)[0, 1])) > 20 * sure


# ---- layouts and snapshots


def shards(start: torch.Tensor) -> dict[str, list[tuple[Any, Placement]]]:
    """Three ways to split 24 rows of 48 groups in two: index of the local part, its placement."""
    gate_up = [
        torch.cat([torch.arange(r * 6, r * 6 + 6), torch.arange(12 + r * 6, 18 + r * 6)])
        for r in range(2)
    ]
    return {
        "rows": [
            (slice(12 * r, 12 * r + 12), Placement.shard(12, 48, axis=0, rank=r, size=2))
            for r in range(2)
        ],
        "groups": [
            (
                (slice(None), slice(None), slice(24 * r, 24 * r + 24)),
                Placement.shard(24, 24, axis=1, rank=r, size=2),
            )
            for r in range(2)
        ],
        "gate and up": [
            (gate_up[r], Placement.shard(12, 48, axis=0, rank=r, size=2, stride=2))
            for r in range(2)
        ],
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["rows", "groups", "gate and up"])
def test_shards_learn_the_bits_of_the_whole(kind: type[RoundingOptimizer], how: str) -> None:
    start = random_logits(24, 48, BF16)
    whole = kind(section(), [linear(start)], SEED, True)
    for step in range(3):
        take_step(whole, step, [random_grad(step, start)])
    for index, placement in shards(start)[how]:
        part = kind(section(), [linear(start[index].contiguous(), placement=placement)], SEED, True)
        for step in range(3):
            take_step(part, step, [random_grad(step, start)[index].contiguous()])
        assert torch.equal(part.logits[0], whole.logits[0][index])
        assert all(
            torch.equal(mine[0], whole.moments()[name][0][index])
            for name, mine in part.moments().items()
        )
    unplaced = kind(
        section(),
        [linear(start[12:], placement=Placement((RowBlock(0, 12, 0),), 0, 48))],
        SEED,
        True,
    )
    for step in range(3):
        take_step(unplaced, step, [random_grad(step, start)[12:]])
    assert not torch.equal(unplaced.logits[0], whole.logits[0][12:]), (
        "the noise does not depend on the place"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [40, 43])
def test_moments_come_back_exactly(kind: type[RoundingOptimizer], groups: int) -> None:
    start = random_logits(groups=groups, dtype=BF16)
    ours = kind(section(), [linear(start)], SEED, True)
    for step in range(3):
        take_step(ours, step, [random_grad(step, start)])
    again, forgetful = (
        kind(section(), [linear(ours.logits[0].detach())], SEED, True) for _ in range(2)
    )
    again.load_moments(
        {name: [one.clone() for one in ones] for name, ones in ours.moments().items()},
        ours.steps_done(),
    )
    for step in range(3, 6):
        for one in (ours, again, forgetful):
            take_step(one, step, [random_grad(step, start)])
    assert same_bits(ours, again)
    assert not same_bits(ours, forgetful)
