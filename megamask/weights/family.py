"""What a model family gives: the numbers that fix its arithmetic, how it reads them, and its
mapping table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.weights.rule import Rule


@dataclass(frozen=True)
class Architecture:
    """The numbers that fix a decoder's arithmetic, whatever the family.

    ``rope_scaling`` is None or a dict: ``{"type": "linear", "factor": f}`` or ``{"type": "llama3",
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}``.
    ``attention_bias`` is the bias of q, k and v, ``attention_out_bias`` that of the output
    projection. ``dtype`` is the dtype that the config names.
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
    """One family: ``read`` checks a parsed config.json, ``rules`` is its mapping table (second
    argument: padded vocabulary).
    """

    read: Callable[[dict[str, Any], Path], Architecture]
    rules: Callable[[Architecture, int], list[Rule]]
