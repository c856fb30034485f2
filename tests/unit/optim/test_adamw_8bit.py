"""torchao's 8-bit AdamW behind our interface: near the exact one, repeatable, exact over a
snapshot, near over another layout.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask.optim import adamw_8bit
from tests.unit.optim.lean import SEED, linear, random_grad, random_logits, section, take_step

pytest.importorskip("torchao")
pytestmark = pytest.mark.slow  # compiles

ROWS, GROUPS = 24, 64  # 9,216 logits, 36 blocks


def build(logits: torch.Tensor) -> Any:
    from megamask.optim.adamw_8bit import AdamW8bit

    return AdamW8bit(section("adamw8bit"), [linear(logits)], SEED)


def run(optimizer: Any, steps: range, rate: float = 1e-3) -> Any:
    for step in steps:
        take_step(optimizer, step, [random_grad(step, optimizer.logits[0]) + 0.01], rate, clip=0.5)
    return optimizer


def restored(optimizer: Any, change: float = 0.0) -> Any:
    again = build(optimizer.logits[0].detach())
    moments = {name: [one.clone() for one in ones] for name, ones in optimizer.moments().items()}
    if change:  # as if blocks of another layout met in one
        moments["exp_avg.scale"][0][:, :, ::2] *= 1 + change
    again.load_moments(moments, optimizer.steps_done())
    return again


@pytest.mark.parametrize("shape", [(16, 4, 64), (16, 1, 256), (24, 6, 64)])
def test_moments_of_a_snapshot_have_memory_of_their_own(shape: tuple[int, ...]) -> None:
    """A snapshot is read into them; where a block is whole rows, one scale stood for 256."""
    found = build(torch.zeros(shape)).moments()
    assert {one.shape for ones in found.values() for one in ones} == {torch.Size(shape)}
    for ones in found.values():
        ones[0].copy_(torch.arange(ones[0].numel()).reshape(shape) % 200)
        assert torch.equal(ones[0].flatten()[:200].long(), torch.arange(200))


def test_it_follows_adamw() -> None:
    start = random_logits(ROWS, GROUPS)
    exact = torch.nn.Parameter(start.double())
    adamw = torch.optim.AdamW([exact], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(6):
        exact.grad = 0.5 * (random_grad(step, start) + 0.01).double()
        adamw.step()
    ours = run(build(start), range(6))
    moved, error = (exact - start).detach(), (ours.logits[0] - exact).detach()
    assert (
        float(error.norm() / moved.norm()) < 0.05
    )  # moments to 0.7 % of the largest of their block; seen: 0.007
    assert ours.steps_done() == 6
    bytes_a_logit = sum(one.nbytes for one in ours.state_tensors()) / start.numel()
    assert bytes_a_logit == pytest.approx(
        2 * (1 + 4 / 256) + 2 * 1024 / start.numel()
    )  # codes, scales, two tables of 256


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)], ids=str
)
def test_it_repeats_itself_and_goes_on_exactly(dtype: torch.dtype) -> None:
    start = random_logits(ROWS, GROUPS, dtype)
    one, other = run(build(start), range(4)), build(start)
    torch.manual_seed(99)  # what else drew from PyTorch's generator must not matter
    half = run(other, range(2))
    state = torch.get_rng_state()
    resumed = run(restored(half), range(2, 4))
    assert torch.equal(torch.get_rng_state(), state), (
        "training noise came from the global generator"
    )
    assert torch.equal(one.logits[0], resumed.logits[0])
    for name, ones in one.moments().items():
        assert torch.equal(ones[0], resumed.moments()[name][0]), name
    assert not torch.equal(run(restored(half, change=0.5), range(2, 4)).logits[0], one.logits[0])


def moment(optimizer: Any, name: str = "exp_avg") -> torch.Tensor:
    value = optimizer.torchao.state[optimizer.logits[0]][name]
    return (value.dequantize() if hasattr(value, "codes") else value).detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_of_layers_too_small_to_quantize_is_another_layout(dtype: torch.dtype) -> None:
    """Four ranks have parts of 2,304 logits, which torchao keeps in the dtype of the logits."""
    start = random_logits(ROWS, GROUPS, dtype)
    whole, parts = build(start), [build(part) for part in start.chunk(4, dim=2)]
    for name in ("exp_avg", "exp_avg_sq"):
        value = random_grad(1, start)
        whole.torchao.state[whole.logits[0]][name].copy_(
            value if name == "exp_avg" else value.square()
        )
    saved = whole.moments()
    for number, part in enumerate(parts):
        assert not hasattr(part.torchao.state[part.logits[0]]["exp_avg"], "codes")
        mine = {key: [one.chunk(4, dim=2)[number].clone()] for key, (one,) in saved.items()}
        assert {key: one.dtype for key, (one,) in part.moments().items()} == {
            key: one.dtype for key, (one,) in mine.items()
        }
        part.load_moments(mine, 3)
        for name in ("exp_avg", "exp_avg_sq"):
            expected = moment(whole, name).chunk(4, dim=2)[number].to(dtype)
            assert torch.equal(moment(part, name), expected) and expected.any()
    # and back: the parts are saved exactly, and the whole is quantized again
    split = [part.moments() for part in parts]
    again, same = build(start), build(parts[0].logits[0].detach())
    same.load_moments(split[0], 3)
    assert torch.equal(moment(same), moment(parts[0]))
    again.load_moments({key: [torch.cat([one[key][0] for one in split], 2)] for key in saved}, 3)
    for name in ("exp_avg", "exp_avg_sq"):
        value = torch.cat([moment(part, name).float() for part in parts], dim=2)
        largest = value.flatten().unflatten(0, (-1, 256)).abs().amax(1)
        error = (moment(again, name) - value).flatten().unflatten(0, (-1, 256)).abs().amax(1)
        assert float((error / largest).max()) < 0.01  # as for other blocks, below
    assert again.steps_done() == 3


def test_scales_of_the_host_meet_codes_of_a_device() -> None:
    """A device without memory stands for CUDA, where a product of both was an error."""
    shape = (16, 4, 16)
    taken: list[torch.Tensor] = []
    codes = torch.zeros(shape, dtype=torch.uint8, device="meta")
    state = SimpleNamespace(codes=codes, block_size=256, copy_=taken.append)
    adamw_8bit._load(state, codes, torch.rand(shape), torch.zeros(256, device="meta"))
    assert taken[0].shape == shape and taken[0].device.type == "meta"


def test_other_blocks_are_quantized_again_to_one_percent() -> None:
    ours = run(build(random_logits(ROWS, GROUPS)), range(3))
    moments = ours.moments()
    again = restored(ours, change=0.25)
    codes, scales = (moments[f"exp_avg.{part}"][0] for part in ("code", "scale"))
    value = again.torchao.state[again.logits[0]]["exp_avg"]
    expected = value.qmap[codes.int()] * scales
    expected[:, :, ::2] *= 1.25
    largest = expected.flatten().unflatten(0, (-1, 256)).abs().amax(1)
    error = (value.dequantize() - expected).flatten().unflatten(0, (-1, 256)).abs().amax(1)
    assert (
        float((error / largest).max()) < 0.01
    )  # half of the widest gap of the code, 1.4 % of the largest; seen: 0.007
