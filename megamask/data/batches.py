"""Which samples a data-parallel replica reads at a step. Shapes: B micro-batch, S sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamask.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of a step in data order, dealt to the replicas in turn.

    Step s covers samples [s * global_batch, (s + 1) * global_batch). Its micro-batch j covers
    ``micro_batch`` of these samples, and is accumulation j // replicas of replica j % replicas.
    So the split into replicas and accumulations changes neither the batch nor the number of a
    micro-batch, which is part of the key of its noise.

    Attributes:
        before_each: called before each micro-batch of this replica is read: a step may take long, a
            micro-batch may not.

    Raises:
        ConfigError: global_batch is not a multiple of micro_batch x replicas.
    """

    dataset: Any
    global_batch: int
    micro_batch: int
    replicas: int
    replica: int
    before_each: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        check_batch(self.global_batch, self.micro_batch, self.replicas)
        assert 0 <= self.replica < self.replicas

    @property
    def accumulations(self) -> int:
        """Micro-batches a replica runs per step."""
        return self.global_batch // (self.micro_batch * self.replicas)

    def micro_batches(self, step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield this replica's (number j within the step, int64 tokens_BS, int64 labels_BS)."""
        for accumulation in range(self.accumulations):
            self.before_each()
            number = accumulation * self.replicas + self.replica
            first = step * self.global_batch + number * self.micro_batch
            samples = [self.dataset[first + row] for row in range(self.micro_batch)]
            yield (
                number,
                torch.stack([sample["tokens"] for sample in samples]),
                torch.stack([sample["labels"] for sample in samples]),
            )


def check_batch(global_batch: int, micro_batch: int, replicas: int, section: str = "learn") -> None:
    """Check that a global batch of the settings ``section`` can be dealt out evenly.

    Raises:
        ConfigError: the batch cannot be dealt out; the message names the nearest that can.
    """
    unit = micro_batch * replicas
    if global_batch % unit == 0:
        return
    below = global_batch // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit}"
    allowed = (
        f"a multiple of {section}.micro_batch x data-parallel replicas = "
        f"{micro_batch} x {replicas} = {unit}"
    )
    raise ConfigError(
        f"{section}.global_batch",
        global_batch,
        allowed,
        f"Set {section}.global_batch to {nearest}, or change {section}.micro_batch.",
    )
