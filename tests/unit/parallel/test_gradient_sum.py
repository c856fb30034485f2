"""dW summed over micro-batches by Megatron's own seam, against the products in fp64.

Shapes: O out_features, I in_features, T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers
from torch.utils.checkpoint import checkpoint

from megamask.config import Config
from megamask.parallel import gradient_sum
from megamask.parallel.gradient_sum import APEX, SummingMultiply, sums_in_multiply
from megamask.parallel.mask_context import MaskSwitch
from megamask.parallel.masked_linear import MaskedColumnParallelLinear, MaskedRowParallelLinear
from megamask.parallel.mesh import start
from megamask.parallel.step_draw import StepDraws
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset.subset import SUBSET

ROWS, COLUMNS, TOKENS, MICRO_BATCHES = 32, 48, 40, 3
SAMPLE = Sample(NoiseKey(3, 1), kappa=100.0, tau=1.0)
# A product of T terms is off by at most T roundings of 2^-24 of the sum of its terms' sizes, and
# so is each of the sums: (40 + 3) 2^-24 = 2.6e-6.
FP32_TOLERANCE = 3e-6
# A dW that leaves the multiply is rounded to bf16, by 2^-8 of its size at most.
BF16_ROUNDING = 2.0**-8
# The gradient at the logits is linear in dW, and up to two roundings of dW meet in it (seen: 1e-3).
LOGIT_TOLERANCE = 4 * BF16_ROUNDING
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def add(x_TI: torch.Tensor, dy_TO: torch.Tensor, sum_OI: torch.Tensor) -> None:
    sum_OI += dy_TO.float().t() @ x_TI.float()


def overwrite(x_TI: torch.Tensor, dy_TO: torch.Tensor, sum_OI: torch.Tensor) -> None:
    sum_OI.copy_(dy_TO.float().t() @ x_TI.float())


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Multiply], None]:
    """Puts a multiply in the place of Apex's and lets it sum on a CPU."""

    def put(multiply: Multiply) -> None:
        module = type("Module", (), {"wgrad_gemm_accum_fp32": staticmethod(multiply)})
        monkeypatch.setattr(layers, APEX, module, raising=False)
        monkeypatch.setattr(gradient_sum, "sums_in_multiply", lambda _: True)

    return put


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    settings = {"device": request.param, "parallel": {"threads": 1}}
    with start(Config.model_validate(settings)) as mesh:
        yield mesh.device


def make_linear(kind: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A linear of random weight and logits."""
    settings = ModelParallelConfig(
        use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype
    )
    row: dict[str, Any] = {"input_is_parallel": True}
    extra = row if kind is MaskedRowParallelLinear else {"gather_output": False}
    linear: Any = kind(
        COLUMNS,
        ROWS,
        config=settings,
        init_method=torch.nn.init.zeros_,
        bias=True,
        skip_bias_add=False,
        **extra,
    ).to(device)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(ROWS, COLUMNS, generator=noise))
        linear.bias.copy_(torch.randn(ROWS, generator=noise))
    linear.requires_grad_(False)
    site = linear.make_site(Pattern(2, 4), "x", SUBSET)
    linear.attach_logits(site, 7, MaskSwitch(), choose_backend("auto", device, SUBSET))
    linear.mask_logits.data.copy_(0.01 * torch.randn(linear.mask_logits.shape, generator=noise))
    linear.mask_logits.main_grad = torch.empty_like(linear.mask_logits)
    return linear


def run_step(
    linear: Any, dtype: torch.dtype, recompute: bool = False, steps: int = 2
) -> dict[str, torch.Tensor]:
    """The sum of dW and the gradient at the logits of the last step, and in fp64 the sum that is
    due and the sums of the sizes of all terms and of all dW.
    """
    draws = StepDraws([linear])
    for step in range(steps):
        noise = torch.Generator().manual_seed(step)
        due, terms, sizes = (torch.zeros(ROWS, COLUMNS, dtype=torch.float64) for _ in range(3))
        draws.begin(SAMPLE, 1e-3, sums_in_fp32=True)
        for _ in range(MICRO_BATCHES):
            x = torch.randn(TOKENS, 1, COLUMNS, generator=noise).to(dtype)
            dy = torch.randn(TOKENS, 1, ROWS, generator=noise).to(dtype)
            near = x.to(linear.weight.device, copy=True).requires_grad_()
            y = checkpoint(lambda t: linear(t)[0], near, use_reentrant=True) if recompute else None
            y = linear(near)[0] if y is None else y
            y.backward(dy.to(y.device))
            product = dy[:, 0].double().t() @ x[:, 0].double()
            due += product
            sizes += product.abs()
            terms += dy[:, 0].double().abs().t() @ x[:, 0].double().abs()
            assert linear.step_weight.grad is None and near.grad is not None
        assert list(draws.end()) == [0]
        draws.drop()
    logits = linear.mask_logits.main_grad.cpu()
    found = draws.buffers[0].cpu().double()
    return {"sum": found, "due": due, "terms": terms, "sizes": sizes, "logits": logits}


def error(run: dict[str, torch.Tensor], of: str) -> float:
    """Largest error of the sum, as a share of the sizes of the ``terms`` or of dW (``sizes``)."""
    return float(((run["sum"] - run["due"]).abs() / run[of]).max())


def logit_error(run: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> float:
    """Largest difference of the gradients at the logits, as a share of the largest gradient."""
    scale = plain["logits"].abs().max()
    return float((run["logits"] - plain["logits"]).abs().max() / scale)


KINDS: list[Any] = [MaskedColumnParallelLinear, MaskedRowParallelLinear]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_multiply_sums_in_megatrons_place_for_it(
    kind: Any, recompute: bool, multiplies: Callable[[Multiply], None]
) -> None:
    with start(Config.model_validate({"device": "cpu", "parallel": {"threads": 1}})) as mesh:
        plain = run_step(make_linear(kind, mesh.device, torch.bfloat16), torch.bfloat16)
        for multiply, is_right in [(add, True), (overwrite, False)]:
            multiplies(multiply)
            linear = make_linear(kind, mesh.device, torch.bfloat16)
            assert not linear.gradient_accumulation_fusion
            run = run_step(linear, torch.bfloat16, recompute)
            assert (error(run, "terms") < FP32_TOLERANCE) == is_right
            assert is_right or error(run, "terms") > 1e-2
            assert (logit_error(run, plain) < LOGIT_TOLERANCE) == is_right


def test_without_the_multiply_each_dw_is_rounded(device: torch.device) -> None:
    """The plain path stays within its roundings, which the sums of the multiply do not make."""
    if device.type == "cuda":
        pytest.skip("the multiply sums there")
    linear = make_linear(MaskedColumnParallelLinear, device, torch.bfloat16)
    assert not sums_in_multiply(linear.weight) and not hasattr(layers, APEX)
    run = run_step(linear, torch.bfloat16)
    slack = float((run["terms"] / run["sizes"]).max()) * FP32_TOLERANCE
    assert error(run, "sizes") < BF16_ROUNDING + slack
    assert error(run, "terms") > 10 * FP32_TOLERANCE


def test_pytorch_sums_fp32_products_on_every_device(device: torch.device) -> None:
    total = torch.full((5, 7), 2.0, device=device)
    SummingMultiply.wgrad_gemm_accum_fp32(
        torch.ones(4, 7, device=device), torch.full((4, 5), 0.5, device=device), total
    )
    assert bool((total == 4.0).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_cuda_the_multiply_sums_as_the_plain_path_does(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"device": "cuda", "parallel": {"threads": 1}}
    with start(Config.model_validate(settings)) as mesh:
        linear = make_linear(kind, mesh.device, dtype)
        assert sums_in_multiply(linear.weight)
        for recompute in (False, True):
            fused = run_step(linear, dtype, recompute)
            monkeypatch.setattr(gradient_sum, "sums_in_multiply", lambda _: False)
            plain = run_step(linear, dtype, recompute)
            monkeypatch.undo()
            # Tensor cores may round fp32 inputs to tf32, 2^-11 each, where PyTorch allows it.
            is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
            assert error(fused, "terms") < (2.0**-10 if is_tf32 else FP32_TOLERANCE)
            assert logit_error(fused, plain) < LOGIT_TOLERANCE
