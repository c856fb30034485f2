"""Input statistics against sums in fp64, and the inputs that they refuse."""

from __future__ import annotations

import pytest
import torch

from megamask.errors import ConfigError
from megamask.oneshot.stats import InputStats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("hessian", [False, True])
def test_streaming_equals_whole(dtype: torch.dtype, hessian: bool) -> None:
    x_TI = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    stats = InputStats(24, hessian)
    for part in x_TI.split(70):
        stats.add(part)
    exact_TI = x_TI.double()
    assert stats.tokens == 300
    # The inputs are exact in fp64, so the difference is the rounding of a sum of 300 terms in fp32,
    # at most 300 * 6e-8.
    torch.testing.assert_close(
        stats.mean_square_I.double(), exact_TI.square().mean(0), rtol=2e-5, atol=0
    )
    if hessian:
        torch.testing.assert_close(
            stats.hessian_II.double(), exact_TI.T @ exact_TI / 300, rtol=2e-5, atol=2e-5
        )
        # The Hessian is not centred.
        assert not torch.allclose(
            stats.hessian_II.double(), torch.cov(exact_TI.T), rtol=2e-5, atol=2e-5
        )


def test_half_precision_inputs_accumulate_in_fp32() -> None:
    stats = InputStats(1, hessian=False)
    for _ in range(300):
        stats.add(torch.ones(1, 1, dtype=torch.bfloat16))
    assert stats.mean_square_I.item() == 1  # a sum in bf16 would stop at 256
    assert stats.sum_square_I.dtype == torch.float32


def test_fast_bf16_products_are_exact_and_leave_no_trace() -> None:
    x_TI = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    precision = torch.get_float32_matmul_precision()
    stats = InputStats(256, hessian=True)
    stats.add(x_TI)
    assert torch.get_float32_matmul_precision() == precision
    exact_II = x_TI.double().T @ x_TI.double() / 4096
    scale = exact_II.diagonal().mean()
    # A sum of 4096 exact products in fp32 is off by a few 1e-7 of the diagonal; sums or products
    # that are rounded to bf16 would be off by 2e-3.
    assert (stats.hessian_II - exact_II).abs().max() < 5e-6 * scale
    assert (x_TI.T @ x_TI / 4096 - exact_II).abs().max() > 5e-6 * scale


def test_leading_axes_are_tokens() -> None:
    x = torch.randn(5, 3, 8)
    whole, flat = InputStats(8, True), InputStats(8, True)
    whole.add(x)
    flat.add(x.reshape(15, 8))
    assert whole.tokens == 15
    assert torch.equal(whole.hessian_II, flat.hessian_II)


def test_hessian_memory_only_when_asked() -> None:
    stats = InputStats(8, hessian=False)
    assert stats.sum_outer_II is None
    stats.add(torch.randn(3, 8))
    with pytest.raises(ValueError, match="without the Hessian"):
        _ = stats.hessian_II


@pytest.mark.parametrize("hessian", [False, True])
def test_refuses_nothing_and_nonsense(hessian: bool) -> None:
    stats = InputStats(8, hessian)
    with pytest.raises(ConfigError, match="calibration"):
        _ = stats.mean_square_I
    with pytest.raises(ValueError, match="8 in_features"):
        stats.add(torch.randn(3, 9))
    broken_TI = torch.ones(3, 8)
    broken_TI[1, 2] = float("nan")
    stats.add(broken_TI)
    with pytest.raises(ConfigError, match="1 of 8 input features"):
        _ = stats.mean_square_I
