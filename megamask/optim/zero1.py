"""ZeRO-1 (Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models"): the optimizer state is divided among the data-parallel replicas.

Without it all replicas keep the same state and make the same update. With it each replica owns some
of the layers. It keeps the state of these layers alone, updates their logits, and sends the new
logits to the others. A layer has one owner as a whole, as in Megatron's
LayerWiseDistributedOptimizer, so all update rules and snapshots work unchanged. (Megatron's
DistributedOptimizer cuts one flat buffer at any element, and knows Adam alone.)

A gradient is summed at its owner only. Sum and broadcast together move the bytes of the one
all-reduce that they replace. Each sum starts as soon as its gradient is complete, and runs while
the backward pass goes on.
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
        mine: indices of the logits that this replica owns.

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
        """Start no sums inside this block: further micro-batches will add to the gradients."""
        self._is_last = False
        try:
            yield
        finally:
            self._is_last = True

    def start_sum(self, number: int) -> None:
        """Start to average gradient ``number`` over the replicas, at its owner. Has no effect
        before the last micro-batch, when the gradient is not complete.
        """
        if self._is_last:
            assert number not in self._sums, "a gradient is complete once in a step"
            grad: torch.Tensor = self.logits[number].main_grad  # type: ignore[attr-defined]
            grad.mul_(1 / self.mesh.dp)
            self._sums[number] = dist.reduce(
                grad, self._ranks[number], group=self.mesh.dp_group, async_op=True
            )

    def finish_sums(self) -> None:
        """Wait until ``main_grad`` of the logits in ``mine`` holds the averages. The other
        gradients are undefined from now on.
        """
        # layers that took no part in the backward pass
        for number in range(len(self.logits)):
            if number not in self._sums:
                self.start_sum(number)
        for work in self._sums.values():
            work.wait()
        self._sums.clear()

    def share_logits(self) -> None:
        """Send the logits in ``mine`` to the other replicas, and receive theirs."""
        pairs = zip(self.logits, self._ranks, strict=True)
        for work in [
            dist.broadcast(one.detach(), rank, group=self.mesh.dp_group, async_op=True)
            for one, rank in pairs
        ]:
            work.wait()

    def from_all(self, values: torch.Tensor) -> torch.Tensor:
        """One number for each logits tensor, (logits,), from the numbers of those in ``mine``. The
        sum over replicas is exact, since it adds zeros only.
        """
        whole = values.new_zeros(len(self.logits))
        whole[self.mine] = values
        dist.all_reduce(whole, group=self.mesh.dp_group)
        return whole

    def _watch(self, number: int, logits: torch.nn.Parameter) -> Any:
        """Call ``start_sum`` when the backward pass has added the gradient of ``logits``. Returns
        the autograd node, which must be kept: Megatron's DDP hooks the same node.
        """
        graph: Any = logits.expand_as(logits).grad_fn
        node = graph.next_functions[0][0]
        node.register_hook(lambda *_: self.start_sum(number))
        return node
