"""Lion against the paper's update in fp64; its kernels against its PyTorch; stochastic rounding; layouts; snapshots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamask.learn.lion import BLOCK, Lion, Lion8bit, dequantize, lion8bit_update, lion_update, round_stochastically
from megamask.sparsity.draw import Placement, RowBlock
from megamask.sparsity.philox import NoiseKey, words
from tests.unit.learn.lean import BETAS, SEED, linear, random_grad, random_logits, section, take_step

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16)]  # of logits and gradients
RATE, DECAY = 3e-4, 0.1


def paper(p: torch.Tensor, m: torch.Tensor, g: torch.Tensor, betas: tuple[float, float] = BETAS) -> tuple[torch.Tensor, ...]:
    """Chen et al. (2023), Alg. 2, in fp64: (new p, new m, the update before its sign)."""
    p, m, g = p.double(), m.double(), g.double()
    update = betas[0] * m + (1 - betas[0]) * g
    return p - RATE * (update.sign() + DECAY * p), betas[1] * m + (1 - betas[1]) * g, update


def neighbours(value: torch.Tensor, relative: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 below and above an fp64 in size; ``relative`` widens it by the error of the fp32 arithmetic."""
    down, up = (value * (1 - relative)).float(), (value * (1 + relative)).float()
    return (down.view(torch.int32) & -0x10000).view(FP32), ((up.view(torch.int32) + 0xFFFF) & -0x10000).view(FP32)


# Four fp32 operations of 2^-24 each on numbers that add up without much cancellation; where they cancel the bound is absolute.
ROUNDING, TINY = 4e-7, 1e-10


def is_lion(before: Any, after: Any, grad: torch.Tensor, betas: tuple[float, float] = BETAS) -> bool:
    """Whether (logits, momentum) moved as the paper says, up to one rounding to a neighbouring bf16 where they are bf16."""
    (p, m), (new_p, new_m) = before, after
    expected_p, expected_m, update = paper(p, m, grad, betas)
    sure = update.abs() > TINY
    low, high = neighbours(expected_m, ROUNDING)
    fits = ((new_m.abs() >= low.abs()) & (new_m.abs() <= high.abs())) | ((new_m - expected_m).abs() < TINY)
    if new_p.dtype == BF16:
        low, high = neighbours(expected_p, ROUNDING)
        good = ((new_p.abs() >= low.abs()) & (new_p.abs() <= high.abs())) | ((new_p - expected_p).abs() < TINY)
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
    assert not is_lion(before, (p.detach(), m), grad, betas=BETAS[::-1])  # type: ignore[arg-type]
    assert not is_lion(before, (p.detach(), m), -grad)


@pytest.mark.parametrize("kind", [Lion, Lion8bit])
@pytest.mark.parametrize(("logits", "grads"), DTYPES)
@pytest.mark.parametrize("groups", [40, 43])
def test_kernels_give_the_bits_of_pytorch(kind: type[Lion], logits: torch.dtype, grads: torch.dtype, groups: int) -> None:
    start, threads = random_logits(groups=groups, dtype=logits), torch.get_num_threads()
    plain, fused = (kind(section(), [linear(start)], SEED, numba) for numba in (False, True))
    try:
        torch.set_num_threads(3)
        for step in range(4):
            for one in (plain, fused):
                take_step(one, step, [random_grad(step, start, grads)], clip=0.3)
    finally:
        torch.set_num_threads(threads)
    assert same(plain, fused)
    take_step(fused, 5, [random_grad(5, start, grads)])
    assert not same(plain, fused)


def same(one: Lion, other: Lion) -> bool:
    pairs = zip([*one.logits, *one.state_tensors()], [*other.logits, *other.state_tensors()], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("update", [lion_update, lion8bit_update])
def test_the_compiled_update_gives_the_bits_of_the_eager_one(update: Any) -> None:
    """What runs on CUDA, compiled for the CPU here."""
    pytest.importorskip("torch._inductor")
    start = random_logits(8, 16, BF16)
    kind = Lion if update is lion_update else Lion8bit
    ids, key = Placement.whole(8, 16).group_ids(16), torch.tensor([SEED, 1, 2, 3])
    numbers = torch.tensor([RATE, DECAY, 0.9, 1 - 0.9, 0.99, 1 - 0.99, 1.0])
    results = []
    for run in (update, torch.compile(update)):
        optimizer = kind(section(), [linear(start)], SEED, False)
        for step in range(2):
            run(optimizer.logits[0].detach(), random_grad(step, start), *optimizer.state[0], ids, key, numbers)
        results.append(optimizer)
    assert same(*results)


def test_words_are_those_of_the_generator() -> None:
    from megamask.learn.lion import _words

    ids, key = Placement.shard(4, 6, axis=1, rank=1, size=2).group_ids(6), NoiseKey(1, 2, 3, 4)
    ours = _words(torch.tensor([1, 2, 3, 4]), ids, 6)
    assert torch.equal(ours, words(key, ids, 6).movedim(0, 1))


def test_a_clip_factor_is_a_smaller_gradient() -> None:
    start = random_logits()
    grad = random_grad(0, start)
    ours, theirs = (Lion(section(), [linear(start)], SEED, True) for _ in range(2))
    take_step(ours, 0, [grad], clip=0.25)
    take_step(theirs, 0, [0.25 * grad])  # a power of two: exact
    assert same(ours, theirs)


# ---- stochastic rounding


def test_plain_bf16_loses_small_updates_and_stochastic_rounding_does_not() -> None:
    """200 steps of 1e-5 from 0.05, whose neighbours in bf16 are 2.4e-4 away."""
    rate, steps, count = 1e-5, 200, 4096
    exact = 0.05 - rate * steps
    plain = torch.full((count,), 0.05, dtype=BF16)
    keyed = linear(torch.full((16, 4, count // 64), 0.05, dtype=BF16))
    lion = Lion(section(weight_decay=0.0), [keyed], SEED, True)
    for step in range(steps):
        plain -= rate
        take_step(lion, step, [torch.ones_like(keyed.mask_logits, dtype=FP32)], rate)
    assert float(plain[0]) == float(torch.tensor(0.05, dtype=BF16)), "plain bf16 moved: the test shows nothing"
    found = keyed.mask_logits.detach().double()
    start_error = float(torch.tensor(0.05, dtype=BF16)) - 0.05
    # The mean of `count` independent roundings: five of its own standard errors.
    assert abs(float(found.mean()) - start_error - exact) < 5 * float(found.std()) / count**0.5 + 1e-8
    assert float(found.std()) > 1e-5


def test_rounding_is_unbiased_and_leaves_representable_values_alone() -> None:
    noise = torch.arange(2**16)  # every value once: the mean is exact but for one part in 2^16 of a bf16 step
    for value in (1.0, -3.140625, 0.123456, -7.654321e-5):
        rounded = round_stochastically(torch.full((2**16,), value), noise).double()
        exact = torch.tensor(value, dtype=FP32).double()
        step = float(2.0 ** (torch.floor(torch.log2(exact.abs())) - 7))
        assert abs(float(rounded.mean() - exact)) <= step * 2.0**-16
        assert set(rounded.unique().tolist()) <= {float(one) for one in neighbours(exact[None], 0.0)[0].double()} | {
            float(one) for one in neighbours(exact[None], 0.0)[1].double()
        }


def test_eight_bit_momentum_follows_the_exact_one() -> None:
    start = random_logits(64, 64)
    ours = Lion8bit(section(), [linear(start)], SEED, True)
    exact = torch.zeros_like(start, dtype=torch.float64)
    for step in range(60):
        grad = random_grad(step, start) + 0.002
        take_step(ours, step, [grad])
        exact = BETAS[1] * exact + (1 - BETAS[1]) * grad.double()
    error = dequantize(*ours.state[0]).double() - exact
    largest = exact.abs().amax(1, keepdim=True).unflatten(2, (-1, BLOCK)).amax(3).repeat_interleave(BLOCK, 2)
    # A step of the code is 1/127 to 1/64 of the block's largest; each update adds a rounding of at most half its std (variance 1/4 step^2)
    # and forgets 1 %: after n steps the error's std is at most half a step times sqrt((1 - 0.99^2n) / (1 - 0.99^2)) = 4.2 steps here.
    assert float((error / largest).std()) < 0.5 / 64 * 5.9
    assert abs(float(error.mean())) < 5 * float(error.std()) / error.numel() ** 0.5 * 2  # the errors of a block are nearly independent
    assert float(exact.mean()) > 20 * abs(float(error.mean()))


# ---- layouts and snapshots


def shards(start: torch.Tensor) -> dict[str, list[tuple[Any, Placement]]]:
    """Three ways to split 24 rows of 48 groups in two: index of the local part, its placement."""
    gate_up = [torch.cat([torch.arange(r * 6, r * 6 + 6), torch.arange(12 + r * 6, 18 + r * 6)]) for r in range(2)]
    return {
        "rows": [(slice(12 * r, 12 * r + 12), Placement.shard(12, 48, axis=0, rank=r, size=2)) for r in range(2)],
        "groups": [
            ((slice(None), slice(None), slice(24 * r, 24 * r + 24)), Placement.shard(24, 24, axis=1, rank=r, size=2)) for r in range(2)
        ],
        "gate and up": [(gate_up[r], Placement.shard(12, 48, axis=0, rank=r, size=2, stride=2)) for r in range(2)],
    }


@pytest.mark.parametrize("kind", [Lion, Lion8bit])
@pytest.mark.parametrize("how", ["rows", "groups", "gate and up"])
def test_shards_learn_the_bits_of_the_whole(kind: type[Lion], how: str) -> None:
    start = random_logits(24, 48, BF16)
    whole = kind(section(), [linear(start)], SEED, True)
    for step in range(3):
        take_step(whole, step, [random_grad(step, start)])
    for index, placement in shards(start)[how]:
        part = kind(section(), [linear(start[index].contiguous(), placement=placement)], SEED, True)
        for step in range(3):
            take_step(part, step, [random_grad(step, start)[index].contiguous()])
        assert torch.equal(part.logits[0], whole.logits[0][index])
        assert torch.equal(part.moments()["momentum"][0], whole.moments()["momentum"][0][index])
    unplaced = kind(section(), [linear(start[12:], placement=Placement((RowBlock(0, 12, 0),), 0, 48))], SEED, True)
    for step in range(3):
        take_step(unplaced, step, [random_grad(step, start)[12:]])
    assert not torch.equal(unplaced.logits[0], whole.logits[0][12:]), "the noise does not depend on the place"


@pytest.mark.parametrize("kind", [Lion, Lion8bit])
@pytest.mark.parametrize("groups", [40, 43])
def test_momentum_comes_back_exactly(kind: type[Lion], groups: int) -> None:
    start = random_logits(groups=groups, dtype=BF16)
    ours = kind(section(), [linear(start)], SEED, True)
    for step in range(3):
        take_step(ours, step, [random_grad(step, start)])
    again = kind(section(), [linear(ours.logits[0].detach())], SEED, True)
    again.load_moments({"momentum": [one.clone() for one in ours.moments()["momentum"]]}, 3)
    for step in range(3, 6):
        for one in (ours, again):
            take_step(one, step, [random_grad(step, start)])
    assert torch.equal(ours.logits[0], again.logits[0])
    assert torch.equal(ours.moments()["momentum"][0], again.moments()["momentum"][0])
    fresh = kind(section(), [linear(again.logits[0].detach())], SEED, True)
    assert not torch.equal(fresh.moments()["momentum"][0], again.moments()["momentum"][0])


def test_tiny_and_zero_momentum() -> None:
    start = random_logits(8, 16)
    for size in (0.0, 1e-42, 1e-38, 1e30):
        ours = [Lion8bit(section(), [linear(start)], SEED, numba) for numba in (True, False)]
        for one in ours:
            take_step(one, 0, [torch.full_like(start, size)])
        assert same(*ours)
        value = dequantize(*ours[0].state[0])
        assert bool(value.isfinite().all())
        assert bool(((value - 0.01 * size).abs() <= 0.01 * size / 64 + 2.0**-126).all())
