"""What the masked linears of a model do now.

One :class:`MaskSwitch` belongs to a model. The step sets it, the linears read it. What a sample
measures is written into the sample's own record, which the step has made and keeps.

Shapes: O local out_features, G local groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megamask.sparsity.draw import Sample


class Measured(NamedTuple):
    """What the sampling of one layer measured besides its masked weight, of the local shard.

    Attributes:
        norm: sum |W * M|^2, 0-d fp64.
        largest: the sum over groups of the largest probability, 0-d fp64; 0 without statistics.
        hard_codes: the hard mask of every group, (O, G); (0,) without statistics.
    """

    norm: torch.Tensor
    largest: torch.Tensor
    hard_codes: torch.Tensor


@dataclass
class RunningSample:
    """The sample that every masked linear of a model draws in one micro-batch.

    Attributes:
        sample: what is drawn; each linear adds its parameter id to the key.
        norm_coef: of the weight-norm term, for one micro-batch.
        is_first: whether it is the first of the step on this replica. The gradient of the first
            replaces the content of the gradient buffers, which nothing else clears, and the first
            takes mask statistics along.
        measured: what the linears measured, by parameter id.
    """

    sample: Sample
    norm_coef: float = 0.0
    is_first: bool = False
    measured: dict[int, Measured] = field(default_factory=dict)


@dataclass
class MaskSwitch:
    """The state that the masked linears of one model share.

    Attributes:
        running: what the running micro-batch draws; None outside learning, and while micro-batches
            share a mask.
        dense: use the plain weights, whatever else is set.
        regenerate: do not keep masked weights for the backward pass; draw them again there.
    """

    running: RunningSample | None = None
    dense: bool = False
    regenerate: bool = False

    @contextmanager
    def without_masks(self) -> Iterator[None]:
        """The dense model inside the block, even within a step."""
        self.dense = True
        try:
            yield
        finally:
            self.dense = False
