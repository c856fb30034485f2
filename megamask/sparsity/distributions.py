"""The distributions of masks."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from megamask.errors import ConfigError
from megamask.sparsity.pattern import Pattern

Distribution = Literal["categorical", "linear"]


DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


MAX_POSITIONS = 32  # of a group under linear: the bits of a winner


def logits_per_group(pattern: Pattern, distribution: str) -> int:
    """C or M.

    Raises:
        ConfigError: more candidates or members than the distribution takes.
    """
    if distribution == "categorical":
        return len(pattern.kept_positions)
    if pattern.m > MAX_POSITIONS:
        limit = f"learn.method=subset takes M up to {MAX_POSITIONS}"
        raise ConfigError(
            "pattern", str(pattern), limit, f"Choose a pattern with M <= {MAX_POSITIONS}."
        )
    return pattern.m


def code_dtype(pattern: Pattern, distribution: str) -> torch.dtype:
    """The smallest integer that holds a candidate index (categorical) or M bits (linear)."""
    if distribution == "categorical" or pattern.m <= 8:
        return torch.uint8
    return torch.int16 if pattern.m <= 16 else torch.int32
