"""The agreement of the layers of the masked model with those of the dense model.

With h the hidden state of a token after a layer of the masked model, and t after the same layer of
the dense model, e = |h - t| / |t| and

    hidden = sum over the layers of (e^2 where e <= 1, else 2 e - 1).

This is distillation from hidden states (Jiao et al., "TinyBERT", arXiv 1909.10351, Eq. 8), relative
to the length of each state, because a few tokens of a language model have states hundreds of times
as long as the others; and with Huber's loss, because a mask may turn another token into such a
token, whose e^2 would be a hundred times the sum of all others.

A text tells a layer one number a token, and the dense model tells it as many numbers as a state
has. So this gradient is far less noisy, and a few steps learn more from both than from the text.

The gradient at h is known as soon as h is there. It is written over t, and an identity behind the
layer adds it in the backward pass. So the part costs one tensor a layer, has no graph of its own,
and works where layers are recomputed.

Shapes: S tokens of a sequence (with sequence parallel, this rank's part), B sequences, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import Any

import torch


class _Phase(Enum):
    """What happens behind a layer."""

    IDLE = auto()
    RECORD = auto()  # the dense model: keep the state
    MATCH = auto()  # the masked model: the state against the dense model's
    AGAIN = auto()  # recomputation in the backward pass: the gradient is there already


class HiddenMatch:
    """Adds the gradient of ``scale * hidden``, summed over tokens, behind every layer.

    A micro-batch runs the dense model within :meth:`recording`, then the masked model within
    :meth:`matching`, then the backward pass.

    Args:
        layers: of the model, in order. Each gets a hook for good.
        scale: weight of a token's ``hidden`` in the loss of the step.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], scale: float) -> None:
        self.scale = scale
        self._phase = _Phase.IDLE
        self._dense: list[torch.Tensor] = []  # (S, B, H) a layer; later the gradient
        self._losses: list[torch.Tensor] = []
        for index, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._after, index))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the states of the dense model, whose forward pass runs inside the block."""
        self.drop()
        self._phase = _Phase.RECORD
        try:
            yield
        finally:
            self._phase = _Phase.IDLE

    @contextmanager
    def matching(self) -> Iterator[None]:
        """Compare with the kept states in the forward pass inside the block. The backward pass may
        come after it.
        """
        self._phase = _Phase.MATCH
        try:
            yield
        finally:
            self._phase = _Phase.AGAIN

    def measured(self) -> torch.Tensor:
        """The sum of ``hidden`` over the tokens of this rank, 0-d fp64."""
        return torch.stack(self._losses).double().sum()

    def drop(self) -> None:
        """Forget the micro-batch, whose backward pass is done."""
        self._phase = _Phase.IDLE
        self._dense, self._losses = [], []

    def _after(self, index: int, layer: torch.nn.Module, args: Any, output: Any) -> Any:
        """The hook: the output of layer ``index``, whose backward pass adds the gradient."""
        if self._phase is _Phase.IDLE:
            return None
        state_SBH, *rest = output if isinstance(output, tuple) else (output,)
        if self._phase is _Phase.RECORD:
            self._dense.append(state_SBH.detach().clone())
            return None
        if self._phase is _Phase.MATCH:
            self._losses.append(gradient_(self._dense[index], state_SBH.detach(), self.scale))
        matched = _AddGradient.apply(state_SBH, self._dense[index])  # type: ignore[no-untyped-call]
        return (matched, *rest) if isinstance(output, tuple) else matched


def gradient_(dense_SBH: torch.Tensor, state_SBH: torch.Tensor, scale: float) -> torch.Tensor:
    """The sum over the tokens of e^2, or 2 e - 1 where e > 1, with e = |h - t| / |t|, 0-d fp32;
    ``scale`` times its gradient at h overwrites t.

    Args:
        dense_SBH: t.
        state_SBH: h.
        scale: factor of the gradient alone.
    """
    target = dense_SBH.float()
    # a state of zeros has no relative error; it must not make a NaN
    square = target.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    behind = state_SBH.float() - target
    error = (behind.square().sum(-1, keepdim=True) / square).sqrt()
    far = error.clamp_min(1.0)  # e where the loss is linear, else 1
    dense_SBH.copy_(behind.mul_(2 * scale / (square * far)))
    return torch.where(error > 1, 2 * error - 1, error.square()).sum()


class _AddGradient(torch.autograd.Function):
    """The identity, whose backward pass adds a gradient."""

    @staticmethod
    def forward(ctx: Any, state_SBH: torch.Tensor, gradient_SBH: torch.Tensor) -> torch.Tensor:
        ctx.gradient_SBH = gradient_SBH
        return state_SBH.view_as(state_SBH)

    @staticmethod
    def backward(ctx: Any, upstream_SBH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream_SBH + ctx.gradient_SBH, None
