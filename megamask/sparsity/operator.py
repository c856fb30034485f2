"""The one door to sampling: (mask logits, frozen weight, sample) -> masked weight, differentiable
in the logits.

The backward pass keeps nothing but the inputs: the noise is drawn again from its key. So a masked
weight is the same under activation recompute and after a resume.
"""

from __future__ import annotations

from typing import Any

import torch

from megamask.sparsity.backends import sampler_for
from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Sampled, Sampler, Site
from megamask.sparsity.unit_sampler import sampler_at

__all__ = ["sample_mask", "sampler_at", "sampler_for"]


def sample_mask(
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    sample: Sample,
    sampler: Sampler,
    sink: GradientSink = RETURNED,
    statistics: bool = False,
) -> Sampled:
    """Sample a mask and apply it to the weight.

    Args:
        mask_logits: (O, L, G) fp32 or bf16.
        weight: (O, I), frozen.
        site: pattern, distribution and place of the shard.
        sample: what is drawn.
        sampler: of ``sampler_at``, or of ``sampler_for`` where every unit is one weight.
        sink: what the backward pass does with the gradient at the logits; autograd gets the
            gradient where the sink has no buffer.
        statistics: also measure the logits without noise.
    """
    arguments = (mask_logits, weight, site, sample, sampler, sink, statistics)
    return Sampled(*_SampleMask.apply(*arguments))  # type: ignore[no-untyped-call]


class _SampleMask(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        sampler: Sampler,
        sink: GradientSink,
        statistics: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(mask_logits, weight)
        ctx.site, ctx.sample, ctx.sampler, ctx.sink = site, sample, sampler, sink
        ctx.set_materialize_grads(False)
        masked, sums, hard_codes = sampler.forward(mask_logits, weight, site, sample, statistics)
        ctx.mark_non_differentiable(sums, hard_codes)
        return masked, sums, hard_codes

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """The gradient at the logits alone: the weight is frozen, sums and hard codes only
        inform.
        """
        mask_logits, weight = ctx.saved_tensors
        gradient = None
        if grad is not None and ctx.needs_input_grad[0]:
            gradient = ctx.sampler.backward(
                grad, mask_logits, weight, ctx.site, ctx.sample, ctx.sink
            )
        return (gradient if ctx.sink.buffer is None else None), *[None] * 6
