"""Checks of the fused kernels of the frozen model against the passes that they replace, run by
test_fused.py: TRITON_INTERPRET decides the device. On CUDA alone:

TRITON_INTERPRET=0 python -m pytest tests/unit/model/fused/fused_checks.py

Shapes: S sequence, B batch, H heads, D width of a head, F width of a gate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamask.config.load import build_config
from megamask.model.build import build_model, masked_linears
from megamask.model.fused import (
    launcher,
    rotation,
    rotation_triton,
    seams,
    swiglu,
    swiglu_triton,
    trial,
)
from megamask.parallel.mesh import start
from megamask.weights.architecture import read_architecture

ON_CUDA = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_CUDA else "cpu"
TINY = Path(__file__).resolve().parents[4] / "configs" / "models" / "tiny-llama.json"
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32])
Results = list[torch.Tensor]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The sign of zero counts too."""
    return tensor.contiguous().view(torch.int16 if tensor.dtype == BF16 else torch.int32)


def same(found: Results, expected: Results) -> bool:
    return all(
        a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(found, expected, strict=True)
    )


def results(function: Callable[[torch.Tensor], torch.Tensor], *inputs: torch.Tensor) -> Results:
    """The output of a function, and the gradient at its input of a gradient at its output."""
    x, grad = inputs
    x = x.detach().requires_grad_()
    out = function(x)
    out.backward(grad)
    assert x.grad is not None
    return [out.detach(), x.grad]


def noise(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Values from N(0, scale^2) with zeros of both signs among them."""
    values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    values.view(-1)[::7], values.view(-1)[::11] = 0.0, -0.0
    return values.to(DEVICE, dtype)


def angles(places: int, width: int) -> torch.Tensor:
    """As ``RotarySets``. From 105,615 on CUDA computes a sine in another way."""
    half = torch.outer(60000.7 * torch.arange(places), 0.01 ** (torch.arange(width // 2) / width))
    return torch.cat([half, half], -1)[:, None, None].to(DEVICE)


def heads_of(width: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys as Megatron cuts them out of queries, keys and values together: (S, B, H, D)."""
    return noise(3, 2, heads, 3 * width, dtype=dtype)[..., width : 2 * width]


def turned_back(grad: torch.Tensor) -> torch.Tensor:
    """The same gradient as attention leaves it, (B, H, S, D) in memory."""
    return grad.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


@pytest.fixture(autouse=True)
def one_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's cosine is numpy's, so PyTorch's passes take numpy's too."""
    if not ON_CUDA:
        for name in ("cos", "sin"):
            function = getattr(np, name)
            exact = lambda x, function=function: torch.from_numpy(function(x.numpy()))  # noqa: E731
            monkeypatch.setattr(torch, name, exact)


@DTYPES
@pytest.mark.parametrize(("width", "heads"), [(16, 3), (12, 70)])
def test_the_rotation_has_the_bits_of_megatrons_passes(
    dtype: torch.dtype, width: int, heads: int
) -> None:
    """70 heads are more than a program turns at once, and 6 dimensions no power of two."""
    t, freqs = heads_of(width, heads, dtype), angles(3, width)
    grad = turned_back(noise(3, 2, heads, width, dtype=dtype, scale=2.0))
    assert rotation.can_rotate(t, freqs) and not t.is_contiguous()
    found = results(lambda x: rotation.rotate(x, freqs), t, grad)
    assert same(found, results(lambda x: rope_utils._apply_rotary_pos_emb_bshd(x, freqs), t, grad))
    late = angles(4, width)[1:]
    assert not same(found, results(lambda x: rotation.rotate(x, late), t, grad))


def test_a_rotation_that_rounds_once_is_seen() -> None:
    """A kernel without the roundings between Megatron's passes would not pass."""
    t, freqs, grad = heads_of(16, 3, BF16), angles(3, 16), noise(3, 2, 3, 16, dtype=BF16)

    def once(x: torch.Tensor) -> torch.Tensor:
        return rope_utils._apply_rotary_pos_emb_bshd(x.float(), freqs).to(BF16)

    found, rounded_once = (
        results(lambda x: rotation.rotate(x, freqs), t, grad),
        results(once, t, grad),
    )
    assert all(not same([one], [other]) for one, other in zip(found, rounded_once, strict=True))


def test_what_the_rotation_does_not_cover_takes_megatrons_passes() -> None:
    """A part of each head, interleaved dimensions, another dtype."""
    t = heads_of(16, 3, FP32)
    for one, freqs, interleaved in (
        (t, angles(3, 8), False),
        (t, angles(3, 16), True),
        (t.half(), angles(3, 16), False),
    ):
        found = seams._rotate(one, freqs, interleaved)
        assert torch.equal(found, rope_utils._apply_rotary_pos_emb_bshd(one, freqs, interleaved))


def silu_product(x: torch.Tensor) -> torch.Tensor:
    """Megatron's passes (mlp.py), with PyTorch's SiLU."""
    gate, up = torch.chunk(x, 2, dim=-1)
    return F.silu(gate) * (up + 0.0)


class _NumpySilu(torch.autograd.Function):
    """PyTorch's formulas with numpy's exp, which is the interpreter's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        wide = x.float()
        return (wide / (1 + torch.from_numpy(np.exp(-wide.numpy())))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        wide = x.float()
        sigmoid = 1 / (1 + torch.from_numpy(np.exp(-wide.numpy())))
        return (grad.float() * sigmoid * (1 + wide * (1 - sigmoid))).to(x.dtype)


def numpy_product(x: torch.Tensor) -> torch.Tensor:
    gate, up = torch.chunk(x, 2, dim=-1)
    silu: torch.Tensor = _NumpySilu.apply(gate)  # type: ignore[no-untyped-call]
    return silu * (up + 0.0)


@DTYPES
@pytest.mark.parametrize("width", [5, 1030])
def test_swiglu_has_the_bits_of_separate_passes(dtype: torch.dtype, width: int) -> None:
    """1,030 columns are more than a program has."""
    x, grad = noise(2, 2, 2 * width, dtype=dtype, scale=3.0), noise(2, 2, width, dtype=dtype)
    found = results(swiglu.swiglu, x, grad)
    assert same(found, results(silu_product if ON_CUDA else numpy_product, x, grad))
    swapped = torch.cat([x[..., width:], x[..., :width]], -1)
    assert not same(found, results(swiglu.swiglu, swapped, grad))


def test_swiglu_has_the_bits_for_every_gate() -> None:
    """All finite numbers of bf16. The interpreter loses the smallest ones and takes long, so it has
    a part of them.
    """
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    every = every[every.isfinite()]
    gate = (every if ON_CUDA else every[every.abs() > 1e-30][::13])[None]
    x = torch.cat([gate, noise(*gate.shape, dtype=BF16).cpu()], -1).to(DEVICE)
    grad = noise(*gate.shape, dtype=BF16).roll(3)
    plain = silu_product if ON_CUDA else numpy_product
    assert same(results(swiglu.swiglu, x, grad), results(plain, x, grad))


@DTYPES
def test_swiglu_is_that_of_pytorch(dtype: torch.dtype) -> None:
    """exp of the interpreter (numpy) is 3 units in the last place off at most, PyTorch's 1; four
    more roundings follow. sigmoid (1 + x (1 - sigmoid)) has parts of at most 1 and |x|. In bf16 a
    factor and a product may each be rounded to the other side.
    """
    x, grad = noise(2, 2, 2 * 300, dtype=dtype, scale=3.0), noise(2, 2, 300, dtype=dtype)
    found, expected = results(swiglu.swiglu, x, grad), results(silu_product, x, grad)
    gate, up = x.float().chunk(2, -1)
    size = [gate * up, torch.cat([(1 + gate.abs()) * grad * up, grad * gate], -1)]
    unit = 8 * 2.0**-24 + (2 * 2.0**-8 if dtype == BF16 else 0)
    for one, other, scale in zip(found, expected, size, strict=True):
        assert ((one.float() - other.float()).abs() <= unit * scale.abs() + 1e-30).all()
    other = F.gelu(gate) * up
    assert not ((found[0].float() - other).abs() <= unit * size[0].abs() + 1e-30).all()


def test_swiglu_saves_its_input_alone() -> None:
    x = noise(2, 2, 10, dtype=FP32).requires_grad_()
    kept: Results = []

    def keep(one: torch.Tensor) -> torch.Tensor:
        kept.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        swiglu.swiglu(x)
    assert [one.data_ptr() for one in kept] == [x.data_ptr()]


@DTYPES
def test_a_trial_finds_kernels_that_fail_or_give_other_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    device, heads = torch.device(DEVICE), [3, 1]
    assert trial.rotation_problem(heads, 16, dtype, device) == ""
    if ON_CUDA:
        assert trial.activation_problem(40, dtype, device) == ""
    elif dtype == FP32:  # the interpreter's exp is numpy's
        assert "of the output have other bits" in trial.activation_problem(40, dtype, device)
    monkeypatch.setattr(trial, "swiglu", lambda both: silu_product(1.01 * both))
    assert "numbers of the output have other bits" in trial.activation_problem(40, dtype, device)

    def doubled(t: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        out = rotation.rotate(t, freqs)
        out.register_hook(lambda grad: 2 * grad)
        return out

    monkeypatch.setattr(trial, "rotate", doubled)
    assert "of the gradient have other bits" in trial.rotation_problem(heads, 16, dtype, device)

    def fail(*_: Any, **constants: Any) -> None:
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.undo()
    monkeypatch.setattr(launcher, "launch", fail)
    for found in (
        trial.activation_problem(40, dtype, device),
        trial.rotation_problem(heads, 16, dtype, device),
    ):
        assert found == "RuntimeError: no compiler"


def trained(fused: bool, recompute: bool | str, dtype: str) -> Results:
    """The losses of a tiny Llama, and the gradients of its linears."""
    parallel = {"threads": 1, "recompute": recompute, "fused": fused}
    config = build_config({"device": DEVICE, "dtype": dtype, "parallel": parallel})
    # The other backward passes of attention add in an order that changes.
    with start(config) as mesh, sdpa_kernel(SDPBackend.MATH):
        model = build_model(config, read_architecture(TINY), mesh)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        linears = masked_linears(model)
        for linear in linears.values():
            linear.weight.requires_grad_(True)
        shape = (2, 16) if ON_CUDA else (2, 2)  # the interpreter takes long for a token
        tokens_BS = torch.randint(512, shape, generator=generator).to(DEVICE)
        losses = model.token_losses(tokens_BS, tokens_BS.roll(-1, 1))
        losses.mean().backward()
        model.sharded_state_dict()  # a module more in the layer has no weights to write
        found = [losses.detach(), *(linear.weight.grad for linear in linears.values())]
        return [one.clone() for one in found if one is not None]


AT_NIGHT = [] if ON_CUDA else [pytest.mark.nightly]  # the interpreter is slow


@pytest.mark.parametrize(
    ("dtype", "recompute"),
    [
        ("fp32", "mlp"),
        pytest.param("bf16", False, marks=AT_NIGHT),
        pytest.param("bf16", True, marks=AT_NIGHT),
    ],
)
def test_a_model_learns_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: str, recompute: bool | str
) -> None:
    """Bit for bit on CUDA. The interpreter's exp has another last digit (2^-23, or 2^-8 in bf16),
    which a dozen passes make larger.
    """
    monkeypatch.setattr(seams, "has_kernels", lambda device: True)
    # The trial would launch kernels too, and would find the interpreter's exp.
    monkeypatch.setattr(seams, "activation_problem", lambda *_: "")
    monkeypatch.setattr(seams, "rotation_problem", lambda *_: "")
    launched: list[Any] = []

    def watch(kernel: Any, *rest: Any, **constants: Any) -> None:
        launched.append(kernel)
        plain(kernel, *rest, **constants)

    plain = launcher.launch
    monkeypatch.setattr(launcher, "launch", watch)
    found = trained(True, recompute, dtype)
    layers = 2
    assert launched.count(swiglu_triton.forward) == layers * (1 + (recompute is not False))
    assert launched.count(swiglu_triton.backward) == layers
    assert launched.count(rotation_triton.rotate) == layers * (4 + 2 * (recompute is True))
    launched.clear()
    expected = trained(False, recompute, dtype)
    assert not launched
    if ON_CUDA:
        assert same(found, expected)
        return
    unit = 32 * 2.0**-23 if dtype == "fp32" else 8 * 2.0**-8
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= unit * other.norm()
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert not (one - other.roll(1, -1)).norm() <= unit * other.norm()
