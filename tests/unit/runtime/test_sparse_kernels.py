"""Conversion of 2:4 weights by PyTorch's own code on a CPU: exact, and as small as counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from megamask.runtime.sparse_kernels import (
    KERNELS,
    P24,
    Shape,
    bytes_of,
    dense_again,
    is_exact,
    is_two_of_four,
)
from tests.unit.masks.test_apply import tiny_model
from tests.unit.runtime.cpu_kernels import products_on_a_cpu, prune

CUTLASS = KERNELS["cutlass"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_masked_linear_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=128).to(dtype)
    prune(model)
    linears = [
        one for one in model.modules() if isinstance(one, torch.nn.Linear) and one.out_features > 50
    ]
    assert len(linears) == 5  # q, o, gate, up, down; k and v have 32 rows
    for linear in linears:
        weight = linear.weight.detach()
        assert is_two_of_four(weight)
        converted = CUTLASS.convert(weight)
        assert type(converted) is SparseSemiStructuredTensorCUTLASS
        assert torch.equal(dense_again(converted).view(torch.int16), weight.view(torch.int16))
        # 2 of 4 values in 16 bits, and two bits for the place of each
        assert bytes_of(converted) == weight.numel() * (16 / 2 + 2 / 2) / 8
        assert bytes_of(weight) == 2 * weight.numel()
        changed = weight.clone()
        changed.view(torch.int16)[3, weight[3].nonzero()[0]] ^= 1  # the last bit of a kept weight
        assert is_exact(converted, weight) and not is_exact(converted, changed)


def test_every_way_to_keep_at_most_two_of_four_comes_back() -> None:
    """All 11 sets of at most two places of a group, in every place of a row."""
    ways = [bits for bits in range(16) if bits.bit_count() <= 2]
    places = torch.tensor([[bits >> place & 1 for place in range(4)] for bits in ways])
    drawn = torch.randint(len(ways), (64, 32), generator=torch.Generator().manual_seed(0))
    values = torch.arange(1.0, 64 * 128 + 1).view(64, 128) % 251 - 125.5
    weight = (places[drawn].flatten(1) * values).bfloat16()
    assert is_exact(CUTLASS.convert(weight), weight)
    weight[5, 8:12] = 1  # a group of four
    assert not is_two_of_four(weight) and not is_exact(CUTLASS.convert(weight), weight)


def test_a_negative_zero_comes_back_as_zero() -> None:
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[0, :2] = torch.tensor([1.0, -0.0])
    found = dense_again(CUTLASS.convert(weight))
    assert is_exact(CUTLASS.convert(weight), weight) and not bool(torch.signbit(found).any())


def test_products_go_through_the_dispatch_of_pytorch() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = weight.masked_fill(~P24.best(weight.abs().float()), 0.0)
    x, bias = torch.randn(2, 3, 128).bfloat16(), torch.randn(64).bfloat16()
    converted = CUTLASS.convert(weight)
    with products_on_a_cpu(), torch.no_grad():
        assert torch.equal(F.linear(x, converted), F.linear(x, weight))
        # the stand-in adds the bias to a product that was rounded already
        assert torch.equal(F.linear(x, converted, bias), F.linear(x, weight) + bias)
        assert torch.equal(torch.mm(converted, torch.eye(128).bfloat16()), weight)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "why"),
    [
        ("cutlass", (64, 128), torch.bfloat16, ""),
        ("cutlass", (32, 64), torch.float16, ""),
        ("cusparselt", (16, 16), torch.bfloat16, ""),
        ("cutlass", (48, 128), torch.bfloat16, "cutlass takes multiples of 32 rows and 64 columns"),
        ("cutlass", (64, 96), torch.bfloat16, "cutlass takes multiples of 32 rows and 64 columns"),
        ("cusparselt", (8, 64), torch.float16, "cusparselt takes multiples of 16 rows"),
        ("cutlass", (0, 64), torch.bfloat16, "cutlass takes multiples"),
        ("cutlass", (64, 64, 64), torch.bfloat16, "cutlass takes multiples"),
        ("cutlass", (64, 128), torch.float32, "fp32: 2:4 kernels take bf16 and fp16"),
        ("cusparselt", (64, 128), torch.int8, "int8: 2:4 kernels take bf16 and fp16"),
    ],
)
def test_what_the_kernels_take(name: str, shape: Shape, dtype: torch.dtype, why: str) -> None:
    said = KERNELS[name].why_not(shape, dtype)
    assert said.startswith(why) and bool(said) == bool(why), said


def test_the_divisors_are_those_of_pytorch() -> None:
    for name, kind in (
        ("cutlass", SparseSemiStructuredTensorCUTLASS),
        ("cusparselt", SparseSemiStructuredTensorCUSPARSELT),
    ):
        for dtype in (torch.bfloat16, torch.float16):
            limits = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
            assert not KERNELS[name].why_not((3 * rows, 5 * columns), dtype)
            assert KERNELS[name].why_not((3 * rows, 5 * columns - 4), dtype)
            assert KERNELS[name].why_not((3 * rows - 1, 5 * columns), dtype)
    # PyTorch itself refuses what its constants leave out.
    with pytest.raises(RuntimeError, match="divisible by 32"):
        CUTLASS.convert(torch.zeros(48, 64, dtype=torch.bfloat16))
