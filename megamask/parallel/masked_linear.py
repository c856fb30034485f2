"""Column and row parallel linears that carry sharded mask logits beside their frozen, sharded
weight.

Both Megatron classes call the overridable ``_forward_impl(input, weight, ...)``; the mixin hands it
the masked weight and inherits bias, sequence parallel, all-reduce and gather. The linears enter a
model through the layer spec.

Shapes: O local out_features, I local in_features, G local groups per row, L logits a group (C
candidates or M members).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megamask.parallel.mask_context import MaskSwitch, StepDraw
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import GradientSink, Sample, Sampled, Sampler, Site
from megamask.sparsity.operator import sample_mask, sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement


class MaskedLinear:
    """Mixin for a Megatron parallel linear. Dense until it is given mask logits or a fixed mask."""

    weight: torch.nn.Parameter
    tp_group: Any
    shard_axis: int  # of the weight: 0 column parallel, 1 row parallel
    stride: int = 1  # stacked parts, each split over the ranks (2 for [gate; up])
    switch: MaskSwitch | None = None
    backend: str
    sampler: Sampler
    site: Site
    parameter_id: int
    mask_logits: torch.nn.Parameter | None
    folded_weight: torch.Tensor | None
    step_draw: StepDraw | None = None
    weight_grad: torch.Tensor | None = None

    def groups(self, pattern: Pattern, name: str) -> int:
        """Local groups per row.

        Raises:
            ConfigError: M does not divide the local in_features.
        """
        return pattern.groups(
            self.weight.shape[1],
            f"in_features of {name}",
            self.tp_group.size() if self.shard_axis == 1 else 1,
        )

    def make_site(self, pattern: Pattern, name: str, distribution: Distribution) -> Site:
        """The place of this shard in the whole layer.

        Raises:
            ConfigError: M does not divide the local in_features, or is too large for the
                distribution.
        """
        rank, size, groups = self.tp_group.rank(), self.tp_group.size(), self.groups(pattern, name)
        placement = Placement.shard(
            self.weight.shape[0],
            groups,
            axis=self.shard_axis,
            rank=rank,
            size=size,
            stride=self.stride,
        )
        return Site(pattern, placement, distribution)

    def attach_logits(
        self,
        site: Site,
        parameter_id: int,
        switch: MaskSwitch,
        backend: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add zero mask logits (O, L, G) in ``dtype``, sharded as the weight is."""
        shape = (
            self.weight.shape[0],
            site.logits_per_group,
            self.weight.shape[1] // site.pattern.m,
        )
        logits = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=self.weight.device))
        set_tensor_model_parallel_attributes(logits, True, self.logits_axis, self.stride)
        # Megatron DDP: not an expert parameter
        logits.allreduce = True  # type: ignore[attr-defined]
        self.site, self.parameter_id, self.switch, self.backend = (
            site,
            parameter_id,
            switch,
            backend,
        )
        self.sampler = sampler_for(backend, site.distribution)
        self.mask_logits = logits

    @property
    def logits_axis(self) -> int:
        """The axis of the logits that is split over the ranks."""
        return 0 if self.shard_axis == 0 else 2

    def masked_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight the matrix multiply sees: masked by a sample while one is set, else folded,
        else dense.
        """
        if self.switch is not None and self.switch.dense:
            return weight
        if self.step_draw is not None:
            return self.step_draw.masked
        switch, sample, logits = self.switch, self._own_sample(), self.mask_logits
        if sample is not None and switch is not None and logits is not None:
            buffer = getattr(logits, "main_grad", None) if torch.is_grad_enabled() else None
            sink = GradientSink(switch.sink.norm_coef, buffer, switch.sink.replace)
            sampled = sample_mask(
                logits, weight, self.site, sample, self.sampler, sink, switch.statistics
            )
            switch.note(self.parameter_id, sampled, switch.statistics)
            return sampled.masked
        return weight if self.folded_weight is None else self.folded_weight

    def _own_sample(self) -> Sample | None:
        sample = self.switch.sample if self.switch else None
        return None if sample is None else sample.of(self.parameter_id)

    @torch.no_grad()
    def begin_step(self, sample: Sample, norm_coef: float, sums_in_fp32: bool) -> Sampled:
        """Draw one mask for all micro-batches of a step.

        Args:
            sample: what is drawn.
            norm_coef: of the weight-norm term, once for the step.
            sums_in_fp32: sum dW over micro-batches in an fp32 buffer (kept for the next step), else
                in the weight's dtype.
        """
        assert self.mask_logits is not None
        own = sample.of(self.parameter_id)
        sampled = self.sampler.forward(
            self.mask_logits.detach(), self.weight.detach(), self.site, own, statistics=True
        )
        if sums_in_fp32 and self.weight_grad is None:
            self.weight_grad = torch.empty_like(
                self.weight, dtype=torch.float32, requires_grad=False
            )
        self.step_draw = StepDraw(
            own,
            norm_coef,
            sampled.masked.requires_grad_(),
            self.weight_grad if sums_in_fp32 else None,
        )
        return sampled

    @torch.no_grad()
    def end_step(self) -> None:
        """Turn the summed dW into the gradient of the logits, which replaces ``main_grad``."""
        step_draw, logits = self.step_draw, self.mask_logits
        assert step_draw is not None and logits is not None
        grad = step_draw.masked.grad if step_draw.weight_grad is None else step_draw.weight_grad
        if grad is not None:
            main_grad = logits.main_grad  # type: ignore[attr-defined]
            sink = GradientSink(step_draw.norm_coef, main_grad, replace=True)
            self.sampler.backward(
                grad, logits.detach(), self.weight.detach(), self.site, step_draw.sample, sink
            )

    def drop_draw(self) -> None:
        """Forget the step's sample. Its hook would keep it alive: the garbage collector does not see
        through tensors.
        """
        if self.step_draw is not None and self.step_draw.hook is not None:
            self.step_draw.hook.remove()
        self.step_draw = None

    def fold(self, mask_OI: torch.Tensor | None) -> None:
        """Use W with exact zeros where ``mask_OI`` is False from now on; None goes back to the
        plain weight.
        """
        self.folded_weight = (
            None
            if mask_OI is None
            else torch.where(mask_OI.to(self.weight.device), self.weight.detach(), 0)
        )

    def hard_mask(self) -> torch.Tensor:
        """The mask of the largest logit of every group, (O, I) bool; draws no noise."""
        assert self.mask_logits is not None
        hard_codes, _ = self.mask_statistics(1.0)
        return self.site.mask_of(hard_codes)

    def mask_statistics(self, kappa: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(hard code of every group, (O, G) as ``Site.mask_of`` reads it; sum over groups of the
        largest probability, 0-d); draws no noise.
        """
        assert self.mask_logits is not None
        return self.sampler.mask_statistics(self.mask_logits.detach(), self.site, kappa)

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        masked = self.masked_weight(weight)
        sample = self._own_sample()
        if sample is None or not draw_again(self.switch, masked, weight):
            return super()._forward_impl(input, masked, *args, **kwargs)  # type: ignore[misc]
        with torch.autograd.graph.saved_tensors_hooks(*self._regeneration(masked, sample)):
            return super()._forward_impl(input, masked, *args, **kwargs)  # type: ignore[misc]

    def _regeneration(self, masked: torch.Tensor, sample: Sample) -> tuple[Any, Any]:
        """Hooks under which autograd keeps the sample instead of the masked weight."""
        address = masked.data_ptr()

        def pack(tensor: torch.Tensor) -> torch.Tensor | None:
            return None if tensor.data_ptr() == address else tensor

        @torch.no_grad()
        def unpack(kept: torch.Tensor | None) -> torch.Tensor:
            if kept is not None:
                return kept
            assert self.mask_logits is not None
            again = self.sampler.forward(
                self.mask_logits.detach(), self.weight.detach(), self.site, sample
            )
            return again.masked

        return pack, unpack

    def _sharded(
        self, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any], axes: dict[str, int]
    ) -> dict[str, Any]:
        """Sharded tensors of weight, bias and logits. MLP splits the weight of [gate; up]; the
        logits are split here.
        """
        state = self.state_dict(prefix="", keep_vars=True)  # type: ignore[attr-defined]
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            axes,
            offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        key = f"{prefix}mask_logits"
        if self.stride == 2 and key in sharded:
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], offsets)
        return sharded


def draw_again(switch: MaskSwitch | None, masked: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the backward pass draws ``masked`` again: it was sampled, and the model is told not
    to keep it.
    """
    return (
        switch is not None
        and switch.regenerate
        and masked is not weight
        and torch.is_grad_enabled()
    )


def _prepare(linear: Any, shard_axis: int, stride: int) -> None:
    linear.shard_axis, linear.stride = shard_axis, stride
    linear.register_parameter("mask_logits", None)
    linear.register_buffer("folded_weight", None, persistent=False)


class MaskedColumnParallelLinear(MaskedLinear, ColumnParallelLinear):  # type: ignore[misc]
    """Y = X W^T with out_features split over ranks. ``force_bias`` overrides the bias that the
    surrounding module asks for.
    """

    def __init__(
        self,
        *args: Any,
        bias: bool = True,
        force_bias: bool | None = None,
        stride: int = 1,
        **kwargs: Any,
    ) -> None:
        ColumnParallelLinear.__init__(
            self, *args, bias=bias if force_bias is None else force_bias, stride=stride, **kwargs
        )
        _prepare(self, shard_axis=0, stride=stride)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Sharding along axis 0 for weight, bias and logits."""
        return self._sharded(
            prefix, sharded_offsets, metadata, {"weight": 0, "bias": 0, "mask_logits": 0}
        )


class MaskedRowParallelLinear(MaskedLinear, RowParallelLinear):  # type: ignore[misc]
    """Y = X W^T with in_features split over ranks; a group never spans two ranks."""

    def __init__(
        self, *args: Any, bias: bool = True, force_bias: bool | None = None, **kwargs: Any
    ) -> None:
        RowParallelLinear.__init__(
            self, *args, bias=bias if force_bias is None else force_bias, **kwargs
        )
        _prepare(self, shard_axis=1, stride=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Sharding along axis 1 for the weight, axis 2 for the logits; the bias is whole."""
        return self._sharded(prefix, sharded_offsets, metadata, {"weight": 1, "mask_logits": 2})
