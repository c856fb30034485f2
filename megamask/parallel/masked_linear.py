"""Column and row parallel linears that carry sharded mask logits beside their frozen, sharded
weight.

Both Megatron classes call the overridable ``_forward_impl(input, weight, ...)``; the mixin hands it
the masked weight and inherits bias, sequence parallel, all-reduce and gather. The linears enter a
model through the layer spec.

Shapes: O local out_features, I local in_features, G local groups per row, L logits a group (C
candidates or M positions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megamask.parallel.mask_context import MaskSwitch, Measured, RunningSample
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import GradientSink, Sample, Sampler, Site
from megamask.sparsity.masking import zero_outside
from megamask.sparsity.operator import sample_mask, sampler_at
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

BLOCK = 1 << 22  # weights whose mask exists at a time while a mask is folded


class MaskedLinear:
    """Mixin for a Megatron parallel linear. Dense until it is given mask logits or a fixed mask."""

    weight: torch.nn.Parameter
    tp_group: Any
    shard_axis: int  # of the weight: 0 column parallel, 1 row parallel
    is_expert: bool  # of Megatron: whether the layer around exchanges tokens and sums
    stride: int = 1  # stacked parts, each split over the ranks (2 for [gate; up])
    switch: MaskSwitch | None = None
    backend: str
    sampler: Sampler
    site: Site
    parameter_id: int
    mask_logits: torch.nn.Parameter | None
    folded_weight: torch.Tensor | None
    step_weight: torch.Tensor | None = None  # (O, I), the masked weight of several micro-batches

    # the place of the layer, and its mask logits

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
        self.sampler = sampler_at(site, backend)
        self.mask_logits = logits

    @property
    def logits_axis(self) -> int:
        """The axis of the logits that is split over the ranks."""
        return 0 if self.shard_axis == 0 else 2

    def exchange_nothing(self) -> None:
        """Take all tokens as they are, and leave the sum over the ranks, of outputs and of
        gradients, to the layer of experts around. For a linear without a bias.
        """
        linear: Any = self
        assert linear.bias is None
        linear.explicit_expert_comm = linear.skip_bias_add = True  # Megatron's words for it
        self.is_expert = True

    # the weight that the matrix multiply sees

    def masked_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` (O, I) as the matrix multiply sees it now: under the mask of the step or of
        the micro-batch if one is set, else under a fixed mask, else dense.
        """
        switch = self.switch
        if switch is not None and switch.dense:
            return weight
        if self.step_weight is not None:
            return self.step_weight
        if switch is not None and switch.running is not None:
            return self._sampled(weight, switch.running)
        return weight if self.folded_weight is None else self.folded_weight

    def _sampled(self, weight: torch.Tensor, running: RunningSample) -> torch.Tensor:
        """Draw the mask of a micro-batch; what the sample measures goes to ``running``."""
        logits = self.mask_logits
        assert logits is not None
        # Megatron's DDP owns the gradient buffer of the logits; nothing clears it between steps.
        buffer = getattr(logits, "main_grad", None) if torch.is_grad_enabled() else None
        masked, sums, hard_codes = sample_mask(
            logits,
            weight,
            self.site,
            running.sample.of(self.parameter_id),
            self.sampler,
            GradientSink(running.norm_coef, buffer, replace=running.is_first),
            statistics=running.is_first,
        )
        running.measured[self.parameter_id] = Measured(sums[0], sums[1], hard_codes)
        return masked

    # a fixed mask

    def fold(self, mask_OI: torch.Tensor | None) -> None:
        """Use W with exact zeros where ``mask_OI`` is False from now on; None goes back to the
        plain weight.
        """
        weight_OI = self.weight.detach()
        self.folded_weight = (
            None if mask_OI is None else zero_outside(weight_OI, mask_OI.to(weight_OI.device))
        )

    def fold_codes(self, hard_codes_OG: torch.Tensor) -> None:
        """``fold`` of the mask of these hard codes; only some rows of the mask exist at a time."""
        weight_OI = self.weight.detach()
        folded_OI = torch.empty_like(weight_OI)
        for rows in row_blocks(*weight_OI.shape):
            mask_OI = self.site.mask_of(hard_codes_OG[rows].to(weight_OI.device))
            folded_OI[rows] = zero_outside(weight_OI[rows], mask_OI)
        self.folded_weight = folded_OI

    def hard_codes(self) -> torch.Tensor:
        """The hard code of every group, (O, G), as ``Site.mask_of`` reads it; draws no noise."""
        return self.mask_statistics(1.0)[0]

    def hard_mask(self) -> torch.Tensor:
        """The mask of the largest logit of every group, (O, I) bool; draws no noise."""
        return self.site.mask_of(self.hard_codes())

    def mask_statistics(self, kappa: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(hard code of every group, (O, G) as ``Site.mask_of`` reads it; sum over groups of the
        largest probability, 0-d); draws no noise.
        """
        assert self.mask_logits is not None
        return self.sampler.mask_statistics(self.mask_logits.detach(), self.site, kappa)

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        masked, switch = self.masked_weight(weight), self.switch
        if masked is self.step_weight and hasattr(masked, "main_grad"):
            kwargs["gradient_accumulation_fusion"] = True  # dW is added to main_grad
        if (
            switch is None
            or not switch.regenerate
            or switch.running is None
            or masked is weight
            or not torch.is_grad_enabled()
        ):
            return super()._forward_impl(input, masked, *args, **kwargs)  # type: ignore[misc]
        sample = switch.running.sample.of(self.parameter_id)
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

    # checkpoints

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


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover the rows of a matrix, each of at most ``BLOCK`` numbers or one row."""
    step = max(1, BLOCK // max(columns, 1))
    yield from (slice(first, min(first + step, rows)) for first in range(0, rows, step))


@contextmanager
def folded_in_turn(
    linears: Iterable[MaskedLinear], codes_of: Callable[[MaskedLinear], torch.Tensor]
) -> Iterator[None]:
    """Every linear computes under a fixed mask inside the block, and only the linear that computes
    holds a masked weight.

    Args:
        linears: the linears.
        codes_of: the hard codes, (O, G), of a linear's mask; asked for at each forward pass.
    """
    with ExitStack() as stack:
        for linear in linears:
            module: Any = linear
            stack.callback(linear.fold, None)
            before = module.register_forward_pre_hook(lambda one, _: one.fold_codes(codes_of(one)))
            after = module.register_forward_hook(lambda one, *_: one.fold(None))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _prepare(linear: Any, shard_axis: int, stride: int) -> None:
    linear.shard_axis, linear.stride = shard_axis, stride
    linear.register_parameter("mask_logits", None)
    linear.register_buffer("folded_weight", None, persistent=False)


class MaskedColumnParallelLinear(MaskedLinear, ColumnParallelLinear):
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


class MaskedRowParallelLinear(MaskedLinear, RowParallelLinear):
    """Y = X W^T + b with in_features split over ranks; a group never spans two ranks.

    The linear adds its bias itself, after the sum over the ranks, and returns no bias for the
    residual connection. Under ``parallel.recompute=mlp`` a returned bias would be an output of
    Megatron's checkpoint. Autograd would then make the frozen parameter a result of that
    checkpoint, and the backward pass would recompute it without end.
    """

    def __init__(
        self,
        *args: Any,
        bias: bool = True,
        force_bias: bool | None = None,
        skip_bias_add: bool = False,
        **kwargs: Any,
    ) -> None:
        RowParallelLinear.__init__(
            self,
            *args,
            bias=bias if force_bias is None else force_bias,
            skip_bias_add=False,
            **kwargs,
        )
        _prepare(self, shard_axis=1, stride=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Sharding along axis 1 for the weight, axis 2 for the logits; the bias is whole."""
        return self._sharded(prefix, sharded_offsets, metadata, {"weight": 1, "mask_logits": 2})
