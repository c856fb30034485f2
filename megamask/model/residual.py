"""Residual connections that Megatron-Core 0.16 has no words for: post-norms, factors, and parallel
parts.

Megatron asks a module in the seat of "bias, dropout, add" for a function of a part's output with
its bias, the residual stream and the dropout. Our row linears add their own bias, and frozen models
have no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megamask.model.layer_parts import FrozenNorm
from megamask.weights.family import Norm

Joined = tuple[torch.Tensor, torch.Tensor | None]


class ResidualSum(torch.nn.Module):
    """residual + factor * norm(output).

    Args:
        config: Megatron's settings of the model.
        norm: of the output; None leaves it.
        factor: of the output.
        adds: whether the residual stream is added.
    """

    def __init__(
        self, config: TransformerConfig, norm: Norm | None, factor: float, adds: bool
    ) -> None:
        super().__init__()
        self.norm = None if norm is None else FrozenNorm(config, config.hidden_size, norm=norm)
        self.factor, self.adds = factor, adds

    def forward(
        self, training: bool, fused: bool
    ) -> Callable[[Joined, torch.Tensor, float], torch.Tensor]:
        """The function that Megatron calls."""
        return self.join

    def join(self, output: Joined, residual: torch.Tensor, dropout: float) -> torch.Tensor:
        """The residual stream after a part."""
        y, bias = output
        assert bias is None, "row linears add their own bias"
        if self.norm is not None:
            y = self.norm(y)
        if self.factor != 1:
            y = y * self.factor
        return residual + y if self.adds else y


class ParallelLayer(TransformerLayer):
    """A layer whose attention and feed-forward part read the same residual stream.

    Its feed-forward part ends with a ``ResidualSum`` that does not add the stream.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x + attention(norm(x)) + mlp(norm'(x))."""
        kwargs.pop("dynamic_inference_decode_only", None)
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        return attended + self._forward_mlp(hidden_states), context
