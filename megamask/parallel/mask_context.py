"""What the masked linears of a model do now, and the one mask that serves a whole step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Sampled


@dataclass
class MaskSwitch:
    """What the masked linears of one model do now. One object per model, set by the step, read by
    the linears.

    Attributes:
        sample: what the running micro-batch draws; None outside learning, and when one sample
            serves a whole step.
        sink: what its backward pass does with the gradient; each linear adds its own buffer.
        statistics: take mask statistics along with the sample.
        dense: use the plain weights, whatever else is set.
        regenerate: do not keep masked weights for the backward pass; draw them again there.
        norms: sum |W * M|^2 of the latest draw, by parameter id (local shards).
        mask_statistics: (hard codes, sum of the largest probabilities) of the latest sample that took
            mask statistics, likewise.
    """

    sample: Sample | None = None
    sink: GradientSink = RETURNED
    statistics: bool = False
    dense: bool = False
    regenerate: bool = False
    norms: dict[int, torch.Tensor] = field(default_factory=dict)
    mask_statistics: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @contextmanager
    def without_masks(self) -> Iterator[None]:
        """The dense model, within a step too."""
        self.dense = True
        try:
            yield
        finally:
            self.dense = False

    def note(self, parameter_id: int, sampled: Sampled, statistics: bool) -> None:
        """Keep what a sample measured, not the masked weight."""
        self.norms[parameter_id] = sampled.sums[0]
        if statistics:
            self.mask_statistics[parameter_id] = (sampled.hard_codes, sampled.sums[1])


@dataclass
class StepDraw:
    """One sample that serves all micro-batches of a step: dlogits is linear in dW, so dW is summed
    and the mask backward runs once.

    Attributes:
        sample: what is drawn.
        norm_coef: of the weight-norm term, once for the step.
        masked: W * M, (O, I), a leaf.
        weight_grad: (O, I) fp32 sum of dW over the micro-batches; None leaves the sum to
            ``masked.grad`` in the weight's dtype.
    """

    sample: Sample
    norm_coef: float
    masked: torch.Tensor
    weight_grad: torch.Tensor | None
    is_empty: bool = True
    hook: Any = None

    def __post_init__(self) -> None:
        if self.weight_grad is not None:
            self.hook = self.masked.register_post_accumulate_grad_hook(self.add)

    def add(self, masked: torch.Tensor) -> None:
        """Move ``masked.grad`` into the sum (a hook that runs when the gradient of a micro-batch is
        there).
        """
        assert self.weight_grad is not None and masked.grad is not None
        if self.is_empty:
            self.weight_grad.copy_(masked.grad)
        else:
            self.weight_grad.add_(masked.grad)
        self.is_empty, masked.grad = False, None
