"""dW of all micro-batches summed by the matrix multiplies that make it.

Megatron's linears can add the gradient at a weight to ``weight.main_grad`` in the multiply itself
(``gradient_accumulation_fusion``). They call Apex's module ``fused_weight_gradient_mlp_cuda`` for
it. Where Apex is absent, :class:`SummingMultiply` stands in its place: cuBLAS adds bf16 products to
an fp32 matrix, which ``torch.addmm`` offers with ``out_dtype`` on CUDA. The products are then added
unrounded; a dW that leaves the multiply is rounded to the dtype of the weight before it is added.

Shapes: O local out_features, I local in_features, T tokens of a micro-batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from megatron.core.tensor_parallel import layers

APEX = "fused_weight_gradient_mlp_cuda"  # the global of Megatron's ``layers`` that holds Apex


class SummingMultiply:
    """The function of Apex's module that Megatron calls for fp32 sums, in PyTorch."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        input_TI: torch.Tensor, grad_output_TO: torch.Tensor, sum_OI: torch.Tensor
    ) -> None:
        """Add the transposed ``grad_output_TO`` times ``input_TI`` to the fp32 ``sum_OI``.

        Raises:
            NotImplementedError: no such multiply of this dtype on this device.
            TypeError: PyTorch's ``addmm`` has no ``out_dtype``.
        """
        if not input_TI.numel():  # an expert without tokens
            return
        if input_TI.dtype == torch.float32:
            sum_OI.addmm_(grad_output_TO.t(), input_TI)
            return
        addmm: Any = torch.addmm
        addmm(sum_OI, grad_output_TO.t(), input_TI, out_dtype=torch.float32, out=sum_OI)


def sums_in_multiply(weight: torch.Tensor) -> bool:
    """Whether the matrix multiplies shall sum the gradient at ``weight`` (O, I) in fp32: on CUDA
    with a multiply that does it. On a CPU dW is added in a pass of its own, always with the same
    bits.
    """
    return weight.is_cuda and _is_right(weight.device, weight.dtype)


@cache
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the multiply that Megatron's linears find on ``device`` adds a product to a sum."""
    multiply: Any = getattr(layers, APEX, None)
    if multiply is None:
        multiply = SummingMultiply
        setattr(layers, APEX, multiply)
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.full((16, 16), 2.0)
    total = total.to(device)
    try:
        multiply.wgrad_gemm_accum_fp32(ones, ones, total)
    except (AttributeError, RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total == 2.0 + 16.0).all())
