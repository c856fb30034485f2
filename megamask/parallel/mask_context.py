"""What the masked linears of a model do now, and the one mask that serves a whole step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megamask.sparsity.draw import Draw, Sampled


@dataclass
class MaskSwitch:
    """What the masked linears of one model do now. One object per model, set by the step, read by
    the linears.

    Attributes:
        draw: the draw of the running micro-batch; None outside learning, and when one draw serves a
            whole step.
        dense: use the plain weights, whatever else is set.
        regenerate: do not keep masked weights for the backward pass; draw them again there.
        norms: sum |W * M|^2 of the latest draw, by parameter id (local shards).
        watched: (winners, sum of the largest probabilities) of the latest draw that watched,
            likewise.
    """

    draw: Draw | None = None
    dense: bool = False
    regenerate: bool = False
    norms: dict[int, torch.Tensor] = field(default_factory=dict)
    watched: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @contextmanager
    def without_masks(self) -> Iterator[None]:
        """The dense model, within a step too."""
        self.dense = True
        try:
            yield
        finally:
            self.dense = False

    def note(self, parameter_id: int, sampled: Sampled, watched: bool) -> None:
        """Keep what a draw measured, not the masked weight."""
        self.norms[parameter_id] = sampled.sums[0]
        if watched:
            self.watched[parameter_id] = (sampled.hard_codes, sampled.sums[1])


@dataclass
class StepDraw:
    """One draw that serves all micro-batches of a step: dlogits is linear in dW, so dW is summed
    and the mask backward runs once.

    Attributes:
        draw: the draw.
        masked: W * M, (O, I), a leaf.
        weight_grad: (O, I) fp32 sum of dW over the micro-batches; None leaves the sum to
            ``masked.grad`` in the weight's dtype.
    """

    draw: Draw
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
