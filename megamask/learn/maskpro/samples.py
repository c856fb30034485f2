"""What MaskPro learns from: a limited set of samples, read again and again, and what each of them
costs under the initial masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from megamask.data.batches import BatchPlan

Sample = dict[str, torch.Tensor]
Losses = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # (tokens, labels), (B, S) -> mean loss of every sample, (B,) fp64


class Reused:
    """The first ``samples`` samples of a dataset without end: in their own order once, then
    shuffled anew for every epoch.

    Args:
        dataset: samples by number.
        samples: how many are used; None uses each once.
        seed: of the shuffling, beside the epoch's number.
    """

    def __init__(self, dataset: Any, samples: int | None, seed: int) -> None:
        self.dataset, self.samples, self.seed = dataset, samples, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, place: int) -> Sample:
        return self.sample(self.number(place))

    def number(self, place: int) -> int:
        """Which sample stands at ``place`` in the order of learning."""
        if self.samples is None or place < self.samples:
            return place
        epoch, within = divmod(place, self.samples)
        return self._order(epoch)[within]

    def sample(self, number: int) -> Sample:
        """Tokens and labels of sample ``number``."""
        found: Sample = self.dataset[number]
        return found

    def _shuffled(self, epoch: int) -> list[int]:
        assert self.samples is not None
        order: list[int] = (
            np.random.default_rng([self.seed, epoch]).permutation(self.samples).tolist()
        )
        return order


class InitialLosses:
    """Losses under the initial masks, found when first needed and kept on their device: one number
    a sample.

    Samples are computed in fixed blocks of their numbers, so that a loss does not depend, in its
    last bits, on the batch that needed it: shuffling, accumulation, replicas and a resume, after
    which losses are found again, all see the same. The first epoch is in the order of
    the numbers: there, blocks are the micro-batches.

    Args:
        dataset: the samples.
        block: samples of a block.
        losses: finds them under the initial masks.
    """

    def __init__(self, dataset: Reused, block: int, losses: Losses) -> None:
        self.dataset, self.block, self.losses = dataset, block, losses
        self.known: dict[int, torch.Tensor] = {}

    def __call__(self, numbers: Sequence[int]) -> torch.Tensor:
        """Loss of every sample, (B,) fp64."""
        for number in numbers:
            if number not in self.known:
                self._find(number // self.block * self.block)
        found = torch.stack([self.known[number] for number in numbers])
        if self.dataset.samples is None:
            self.known.clear()  # none comes again
        return found

    def _find(self, first: int) -> None:
        last = (
            first + self.block
            if self.dataset.samples is None
            else min(first + self.block, self.dataset.samples)
        )
        samples = [self.dataset.sample(number) for number in range(first, last)]
        tokens, labels = (
            torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels")
        )
        losses = self.losses(tokens, labels).unbind()
        self.known.update(zip(range(first, last), losses, strict=True))


def numbers_of(plan: BatchPlan, step: int, micro_batch: int) -> list[int]:
    """Numbers of the samples of a micro-batch."""
    first = step * plan.global_batch + micro_batch * plan.micro_batch
    return [plan.dataset.number(first + row) for row in range(plan.micro_batch)]
