"""The facts of a model family: how its config.json is read, and its mapping table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.weights.rule import Rule


@dataclass(frozen=True)
class Architecture:
    """The numbers that fix the arithmetic of a decoder; they are the same for every family.

    Attributes:
        family: key of ``megamask.weights.families.FAMILIES``.
        rope_scaling: None, or ``{"type": "linear", "factor": f}``, or ``{"type": "llama3"}`` with
            the keys ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
            ``original_max_position_embeddings``.
        attention_bias: whether the projections of queries, keys and values have a bias.
        attention_out_bias: whether the output projection of the attention has a bias.
        tied: whether the head shares the weight of the embedding.
        dtype: the dtype that the config names.
    """

    family: str
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        read: ``read(config, path)`` checks a parsed config.json and returns the architecture; it
            raises ConfigError for a key that it does not know.
        rules: ``rules(arch, padded_vocab)`` returns the mapping table in the order of the model.
    """

    read: Callable[[dict[str, Any], Path], Architecture]
    rules: Callable[[Architecture, int], list[Rule]]
