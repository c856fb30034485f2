"""ZeRO-1 over data-parallel replicas: each updates some of the layers and keeps the optimizer state
of those alone.

A layer has one owner, as in Megatron's LayerWiseDistributedOptimizer: every update rule works
unchanged, and so do snapshots, in which a moment has the shape of its logits. (Megatron's
DistributedOptimizer cuts one flat buffer anywhere and knows Adam alone.) Gradients are summed at
their owner instead of everywhere, and updated logits sent back: together the bytes of one
all-reduce. Each sum starts as soon as its gradient is complete and runs while the backward pass
goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megamask.parallel.mesh import Mesh
from megamask.parallel.partition import owners


class Replicas:
    """The division of ``logits`` among the replicas of ``mesh``.

    Attributes:
        mine: numbers of the logits that this replica updates.

    Raises:
        ConfigError: there are more replicas than layers.
    """

    def __init__(self, logits: Sequence[torch.nn.Parameter], mesh: Mesh) -> None:
        self.logits, self.mesh = list(logits), mesh
        owner_of = owners([one.numel() for one in self.logits], mesh.dp)
        self.mine = [number for number, owner in enumerate(owner_of) if owner == mesh.dp_rank]
        self._ranks = [dist.get_global_rank(mesh.dp_group, owner) for owner in owner_of]
        self._is_last = True
        self._sums: dict[int, Any] = {}
        self._nodes = [self._watch(number, one) for number, one in enumerate(self.logits)]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients are not complete yet: other micro-batches follow."""
        self._is_last = False
        try:
            yield
        finally:
            self._is_last = True

    def start_sum(self, number: int) -> None:
        """The gradient ``number`` is complete (in the last micro-batch): start to average it over
        the replicas, at its owner.
        """
        if self._is_last:
            assert number not in self._sums, "one gradient a micro-batch"
            grad: torch.Tensor = self.logits[number].main_grad  # type: ignore[attr-defined]
            grad.mul_(1 / self.mesh.dp)
            self._sums[number] = dist.reduce(
                grad, self._ranks[number], group=self.mesh.dp_group, async_op=True
            )

    def finish_sums(self) -> None:
        """Wait until the gradients of ``mine`` are averages in ``main_grad``; those of others are
        undefined from now on.
        """
        for number in range(len(self.logits)):
            if number not in self._sums:
                self.start_sum(number)
        for work in self._sums.values():
            work.wait()
        self._sums.clear()

    def share_logits(self) -> None:
        """Send the logits of ``mine`` to the other replicas, and take over theirs."""
        pairs = zip(self.logits, self._ranks, strict=True)
        for work in [
            dist.broadcast(one.detach(), rank, group=self.mesh.dp_group, async_op=True)
            for one, rank in pairs
        ]:
            work.wait()

    def from_all(self, values: torch.Tensor) -> torch.Tensor:
        """A number per logits, from the numbers of ``mine``. Exact: nothing but zeros is added."""
        whole = values.new_zeros(len(self.logits))
        whole[self.mine] = values
        dist.all_reduce(whole, group=self.mesh.dp_group)
        return whole

    def _watch(self, number: int, logits: torch.nn.Parameter) -> Any:
        """Call ``start_sum`` when the backward pass is done with ``logits``. Megatron's DDP hooks
        into the same node; it must be kept.
        """
        graph: Any = logits.expand_as(logits).grad_fn
        node = graph.next_functions[0][0]
        node.register_hook(lambda *_: self.start_sum(number))
        return node
