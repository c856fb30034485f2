"""Checks of the CUDA kernels of the lean optimizers against plain PyTorch, run by
test_rounding_triton.py: TRITON_INTERPRET decides the device. They give the same bits.

Shapes: O rows, C logits of a group, G groups per row.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from megamask.optim import stochastic_rounding_triton as kernels
from megamask.optim.adamw_bf16 import AdamWBf16
from megamask.optim.lion import Lion
from megamask.optim.lion_8bit import Lion8bit
from megamask.optim.stochastic_rounding import KEPT, RoundingOptimizer
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.kernels.triton_tiles import word_block
from megamask.sparsity.shard import Placement
from tests.unit.optim.lean import BETAS, linear, same_bits, section

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16)]  # of logits and gradients
KINDS: list[type[RoundingOptimizer]] = [AdamWBf16, Lion, Lion8bit]
# Few logits a group, and more than stay in registers; neither is a multiple of a block of words.
FEW, MANY = 6, KEPT + 2
ROWS = 4 if DEVICE == "cpu" else 256
GROUPS = 43  # no multiple of a tile, or of a block of exponents
SEED, STEP, PARAMETER = 2**32 - 3, 2**31, 2**32 - 7
STEPS, RATE, CLIP = 2, 3e-4, 0.3


def problem(
    logits: torch.dtype, grads: torch.dtype, candidates: int, groups: int = GROUPS
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (O, C, G), and a gradient for each step."""
    random = torch.Generator().manual_seed(candidates)
    start, *gradients = (
        size * torch.randn(ROWS, candidates, groups, generator=random)
        for size in (0.02, *[0.01] * STEPS)
    )
    return start.to(DEVICE, logits), [one.to(DEVICE, grads) for one in gradients]


def learned(
    kind: type[RoundingOptimizer], start: torch.Tensor, gradients: list[torch.Tensor], fused: bool
) -> RoundingOptimizer:
    """The optimizer of a gated shard after the steps: by the kernel, or in plain PyTorch."""
    rows, _, groups = start.shape
    place = Placement.shard(rows, groups, axis=0, rank=1, size=2, stride=2)
    one = kind(section(betas=BETAS), [linear(start, PARAMETER, place)], SEED, False)
    if fused:
        one.by_pytorch = one.by_triton  # type: ignore[method-assign]
    for number, gradient in enumerate(gradients):
        one.logits[0].main_grad = gradient.clone()  # type: ignore[attr-defined]
        one.step(STEP + number, RATE, torch.tensor(CLIP, device=start.device))
    return one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("logits", "grads", "candidates"), [(*DTYPES[0], FEW), (*DTYPES[1], FEW), (*DTYPES[2], MANY)]
)
def test_kernels_give_the_bits_of_pytorch(
    kind: type[RoundingOptimizer], logits: torch.dtype, grads: torch.dtype, candidates: int
) -> None:
    start, gradients = problem(logits, grads, candidates)
    plain, fused = (learned(kind, start, gradients, fused) for fused in (False, True))
    assert same_bits(plain, fused)
    assert not torch.equal(fused.logits[0], start)


def test_four_groups_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of a big layer, in a small one."""
    monkeypatch.setattr(triton_host, "MANY_GROUPS", 1)
    for groups in (160,) if DEVICE == "cpu" else (160, 1024, 1021):
        start, gradients = problem(BF16, BF16, FEW, groups)
        for kind in KINDS:
            assert same_bits(*(learned(kind, start, gradients, fused) for fused in (False, True)))


@triton.jit
def cut_off(value, noise):
    """The wrong rounding: noise is left out."""
    return (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def late_words(named, block):
    """Wrong noise: that of the next four logits."""
    return word_block(named, block + 1)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep the helpers that they met")
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_rounding_shows(
    kind: type[RoundingOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, gradients = problem(BF16, FP32, FEW)
    plain = learned(kind, start, gradients, False)
    with monkeypatch.context() as changed:
        changed.setattr(kernels, "_rounded", cut_off)
        assert not same_bits(plain, learned(kind, start, gradients, True))
    with monkeypatch.context() as changed:
        changed.setattr(kernels, "word_block", late_words)
        assert not same_bits(plain, learned(kind, start, gradients, True))
    assert same_bits(plain, learned(kind, start, gradients, True))


def test_tiny_zero_and_huge_momentum_and_nan() -> None:
    for size in (1e-38, 1e30) if DEVICE == "cpu" else (0.0, 1e-42, 1e-38, 1e30):
        start, gradients = problem(BF16, FP32, FEW)
        gradients = [torch.full_like(one, size) for one in gradients]
        for kind in KINDS:
            assert same_bits(*(learned(kind, start, gradients, fused) for fused in (False, True)))
    gradients[0].view(torch.int32)[1, 2, 3] = 0x7FFFFFFF  # CUDA's NaN
    for kind in (AdamWBf16, Lion):
        moment = learned(kind, start, gradients[:1], True).state[0][0]
        assert torch.equal(moment.isnan(), gradients[0].isnan()) and bool(moment[1, 2, 3].isnan())


def test_a_layer_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard of two row blocks too."""
    launches: list[Any] = []
    true = triton_host.launch

    def launch(*arguments: Any, **constants: Any) -> None:
        launches.append(arguments[0])
        true(*arguments, **constants)

    monkeypatch.setattr(triton_host, "launch", launch)
    start, gradients = problem(BF16, BF16, FEW)
    learned(Lion, start, gradients, True)
    assert launches == [kernels.lion] * STEPS
