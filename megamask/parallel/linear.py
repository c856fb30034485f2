"""Column and row parallel linears that carry sharded mask logits beside their frozen, sharded weight.

Both Megatron classes call the overridable ``_forward_impl(input, weight, ...)``; the mixin hands it the masked weight and
inherits bias, sequence parallel, all-reduce and gather. The linears enter a model through the layer spec.

Shapes: O local out_features, I local in_features, G local groups per row, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megamask.sparsity.draw import Draw, Placement, Site
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.sample import SampleMask


@dataclass
class MaskSwitch:
    """What the masked linears of one model do now. One object per model, set by the step, read by the linears.

    Attributes:
        draw: the draw of the running micro-batch; None outside learning.
        norms: sum |W * M|^2 of the latest draw, by parameter id (local shards).
    """

    draw: Draw | None = None
    norms: dict[int, torch.Tensor] = field(default_factory=dict)


class MaskedLinear:
    """Mixin for a Megatron parallel linear. Dense until it is given mask logits or a fixed mask."""

    weight: torch.nn.Parameter
    tp_group: Any
    shard_axis: int  # of the weight: 0 column parallel, 1 row parallel
    stride: int = 1  # stacked parts, each split over the ranks (2 for [gate; up])
    switch: MaskSwitch | None = None
    backend: ModuleType
    site: Site
    parameter_id: int
    mask_logits: torch.nn.Parameter | None
    folded_weight: torch.Tensor | None

    def make_site(self, pattern: Pattern, name: str) -> Site:
        """The place of this shard in the whole layer.

        Raises:
            ConfigError: M does not divide the local in_features.
        """
        rank, size = self.tp_group.rank(), self.tp_group.size()
        groups = pattern.groups(self.weight.shape[1], f"in_features of {name}", size if self.shard_axis == 1 else 1)
        placement = Placement.shard(self.weight.shape[0], groups, axis=self.shard_axis, rank=rank, size=size, stride=self.stride)
        return Site(pattern, placement)

    def attach_logits(self, site: Site, parameter_id: int, switch: MaskSwitch, backend: ModuleType) -> None:
        """Add zero mask logits (O, C, G) fp32, sharded as the weight is."""
        shape = (self.weight.shape[0], site.pattern.num_candidates, self.weight.shape[1] // site.pattern.m)
        logits = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=self.weight.device))
        set_tensor_model_parallel_attributes(logits, True, self.logits_axis, self.stride)
        logits.allreduce = True  # type: ignore[attr-defined]  # Megatron DDP: not an expert parameter
        self.site, self.parameter_id, self.switch, self.backend = site, parameter_id, switch, backend
        self.mask_logits = logits

    @property
    def logits_axis(self) -> int:
        """The axis of the logits that is split over the ranks."""
        return 0 if self.shard_axis == 0 else 2

    def masked_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight the matrix multiply sees: sampled while a draw is set, else folded, else dense."""
        draw = self.switch.draw if self.switch else None
        if draw is not None and self.mask_logits is not None:
            assert self.switch is not None
            own = replace(draw, key=draw.key.of(self.parameter_id))
            masked, norm = SampleMask.apply(self.mask_logits, weight, self.site, own, self.backend)
            self.switch.norms[self.parameter_id] = norm
            return masked
        return weight if self.folded_weight is None else self.folded_weight

    def fold(self, mask_OI: torch.Tensor | None) -> None:
        """Use W with exact zeros where ``mask_OI`` is False from now on; None goes back to the plain weight."""
        self.folded_weight = None if mask_OI is None else torch.where(mask_OI.to(self.weight.device), self.weight.detach(), 0)

    def winner_mask(self) -> torch.Tensor:
        """The mask of the largest logit of every group, (O, I) bool; draws no noise."""
        assert self.mask_logits is not None
        winner, _ = self.backend.survey(self.mask_logits, 1.0)
        return self.site.pattern.mask_of(winner)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._forward_impl(input, self.masked_weight(weight), *args, **kwargs)  # type: ignore[misc]

    def _sharded(self, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any], axes: dict[str, int]) -> dict[str, Any]:
        """Sharded tensors of weight, bias and logits. MLP splits the weight of [gate; up]; the logits are split here."""
        state = self.state_dict(prefix="", keep_vars=True)  # type: ignore[attr-defined]
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, axes, offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        key = f"{prefix}mask_logits"
        if self.stride == 2 and key in sharded:
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], offsets)
        return sharded


def _prepare(linear: Any, shard_axis: int, stride: int) -> None:
    linear.shard_axis, linear.stride = shard_axis, stride
    linear.register_parameter("mask_logits", None)
    linear.register_buffer("folded_weight", None, persistent=False)


class MaskedColumnParallelLinear(MaskedLinear, ColumnParallelLinear):  # type: ignore[misc]
    """Y = X W^T with out_features split over ranks. ``force_bias`` overrides the bias that the surrounding module asks for."""

    def __init__(self, *args: Any, bias: bool = True, force_bias: bool | None = None, stride: int = 1, **kwargs: Any) -> None:
        ColumnParallelLinear.__init__(self, *args, bias=bias if force_bias is None else force_bias, stride=stride, **kwargs)
        _prepare(self, shard_axis=0, stride=stride)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Sharding along axis 0 for weight, bias and logits."""
        return self._sharded(prefix, sharded_offsets, metadata, {"weight": 0, "bias": 0, "mask_logits": 0})


class MaskedRowParallelLinear(MaskedLinear, RowParallelLinear):  # type: ignore[misc]
    """Y = X W^T with in_features split over ranks; a group never spans two ranks."""

    def __init__(self, *args: Any, bias: bool = True, force_bias: bool | None = None, **kwargs: Any) -> None:
        RowParallelLinear.__init__(self, *args, bias=bias if force_bias is None else force_bias, **kwargs)
        _prepare(self, shard_axis=1, stride=1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Sharding along axis 1 for the weight, axis 2 for the logits; the bias is whole."""
        return self._sharded(prefix, sharded_offsets, metadata, {"weight": 1, "mask_logits": 2})
