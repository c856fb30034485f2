"""One mask of every layer for several micro-batches of a step, and one mask backward at their end.

The gradient at the mask logits is linear in dW, the gradient at the masked weight. So dW is summed
over the micro-batches, and the sum goes back through the mask once. On CUDA the matrix multiplies
sum (``gradient_sum.py``).

Shapes: O local out_features, I local in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from megamask.parallel import gradient_sum
from megamask.parallel.mask_context import Measured
from megamask.parallel.masked_linear import MaskedLinear
from megamask.sparsity.draw import GradientSink, Sample
from megamask.sparsity.kernels.numba_host import side_by_side

Result = TypeVar("Result")


class LayerDraw:
    """The mask of one layer that serves several micro-batches.

    Args:
        linear: the layer. It multiplies by this masked weight until ``drop``.
        sample: what is drawn.
        norm_coef: of the weight-norm term, for all these micro-batches together.
        sums: (O, I) fp32 buffer for the sum of dW, its content undefined; None leaves the sum to
            autograd, in the dtype of the weight.
        is_first: whether it is the first mask of the step. Its gradient replaces the content of
            ``main_grad``, and it takes mask statistics along.

    Attributes:
        masked: W * M, (O, I), a leaf.
        measured: what the sample measured.
    """

    @torch.no_grad()
    def __init__(
        self,
        linear: MaskedLinear,
        sample: Sample,
        norm_coef: float,
        sums: torch.Tensor | None,
        is_first: bool,
    ) -> None:
        assert linear.mask_logits is not None
        self.linear, self.sample, self.norm_coef = linear, sample.of(linear.parameter_id), norm_coef
        masked, both, hard_codes = linear.sampler.forward(
            linear.mask_logits.detach(),
            linear.weight.detach(),
            linear.site,
            self.sample,
            statistics=is_first,
        )
        self.masked = linear.step_weight = masked.requires_grad_()
        self.measured = Measured(both[0], both[1], hard_codes)
        self.sums, self._is_empty, self._is_first = sums, True, is_first
        self._hook: Any = None
        if sums is None:
            return
        if gradient_sum.sums_in_multiply(self.masked):
            self.masked.main_grad = sums.zero_()  # type: ignore[attr-defined]
        else:
            self._hook = self.masked.register_post_accumulate_grad_hook(self._add)

    def _add(self, masked: torch.Tensor) -> None:
        """Add the gradient of a micro-batch to the sum, and free it."""
        assert self.sums is not None and masked.grad is not None
        if self._is_empty:
            self.sums.copy_(masked.grad)
        else:
            self.sums.add_(masked.grad)
        self._is_empty, masked.grad = False, None

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the sum of dW into the gradient at the mask logits, which replaces the content of
        ``main_grad`` or is added to it.
        """
        linear, grad = self.linear, self.masked.grad if self.sums is None else self.sums
        if grad is None:
            return
        logits: Any = linear.mask_logits
        sink = GradientSink(self.norm_coef, logits.main_grad, replace=self._is_first)
        linear.sampler.backward(
            grad, logits.detach(), linear.weight.detach(), linear.site, self.sample, sink
        )

    def drop(self) -> None:
        """Let the layer go. The hook is removed because it would keep the masked weight alive: the
        garbage collector does not see through tensors.
        """
        if self._hook is not None:
            self._hook.remove()
        self.linear.step_weight = None


class StepDraws:
    """The masks of all layers that serve several micro-batches.

    Attributes:
        layers: the masks of now, in the order of the linears; empty between steps.
        buffers: fp32 sums of dW, (O, I) each, which stay from step to step; empty until a step asks
            for them.
    """

    def __init__(self, linears: Sequence[MaskedLinear]) -> None:
        self.linears = list(linears)
        self.layers: list[LayerDraw] = []
        self.buffers: list[torch.Tensor] = []

    def begin(
        self, sample: Sample, norm_coef: float, sums_in_fp32: bool, is_first: bool = True
    ) -> dict[int, Measured]:
        """Draw the mask of every layer.

        Args:
            sample: what is drawn.
            norm_coef: of the weight-norm term, for all micro-batches of these masks together.
            sums_in_fp32: sum dW over micro-batches in fp32, else in the dtype of the weight.
            is_first: whether these are the first masks of the step.

        Returns:
            What the sample measured, by parameter id.
        """
        if sums_in_fp32 and not self.buffers:
            self.buffers = [
                torch.empty_like(linear.weight, dtype=torch.float32, requires_grad=False)
                for linear in self.linears
            ]
        sums = self.buffers if sums_in_fp32 else [None] * len(self.linears)
        pairs = list(zip(self.linears, sums, strict=True))
        self.layers = list(
            self._each(lambda pair: LayerDraw(pair[0], sample, norm_coef, pair[1], is_first), pairs)
        )
        return {one.linear.parameter_id: one.measured for one in self.layers}

    def end(self) -> Iterator[int]:
        """Make the gradient of every layer's logits; yields the number of each layer that is done,
        ascending.
        """
        for number, _ in enumerate(self._each(LayerDraw.finish, self.layers)):
            yield number

    def drop(self) -> None:
        """Forget the masks."""
        for one in self.layers:
            one.drop()
        self.layers = []

    def _each(self, work: Callable[[Any], Result], items: Sequence[Any]) -> Iterator[Result]:
        """``work`` of every item, in order; one item per thread where the kernels leave the threads
        free.
        """
        is_threaded = all(linear.backend == "numba" for linear in self.linears)
        return side_by_side(work, items) if is_threaded else map(work, items)
