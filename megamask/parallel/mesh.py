"""Process groups and the device of this process, from the launcher's environment, and the changes
that make Megatron-Core run without CUDA.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import random
from torch.overrides import TorchFunctionMode

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.process.place import this_place


@dataclass(frozen=True)
class Mesh:
    """The place of this process in the layout.

    The tensor-parallel (TP) ranks hold shards of each layer. The data-parallel (DP) ranks hold
    copies of the same shard and see different data.

    Attributes:
        device: device of this process.
        rank, world: number of this process, and number of all processes.
        tp, tp_rank: number of shards, and the shard of this process.
        dp, dp_rank: number of copies, and the copy of this process.
    """

    device: torch.device
    rank: int
    world: int
    tp: int
    tp_rank: int
    dp: int
    dp_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes shared files and talks to the user."""
        return self.rank == 0

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The processes that hold the shards of one copy of the model."""
        group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """The processes that hold the same shard."""
        group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
        return group

    def sum_over_tp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of ``tensor`` over the shards, in place."""
        if self.tp > 1:
            dist.all_reduce(tensor, group=self.tp_group)
        return tensor

    def mean_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of ``tensor`` over the copies, in place."""
        if self.dp > 1:
            dist.all_reduce(tensor, group=self.dp_group)
            tensor /= self.dp
        return tensor

    def gather_over_tp(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The equally shaped tensors of all shards, in rank order."""
        if self.tp == 1:
            return [tensor]
        shards = [torch.empty_like(tensor) for _ in range(self.tp)]
        dist.all_gather(shards, tensor.contiguous(), group=self.tp_group)
        return shards

    def gather_to_first(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The equally shaped tensors of all shards, in rank order, on the first rank of a copy; an
        empty list on the other ranks. The dtype may be any.
        """
        if self.tp == 1:
            return [tensor]
        raw = tensor.contiguous().view(torch.uint8)  # gloo and NCCL do not know every integer
        shards = [torch.empty_like(raw) for _ in range(self.tp)] if self.tp_rank == 0 else None
        dist.gather(raw, shards, dist.get_global_rank(self.tp_group, 0), self.tp_group)
        return [shard.view(tensor.dtype) for shard in shards or []]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process; all processes get the same answer."""
        if self.world == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    def from_main(self, text: str) -> str:
        """``text`` of the main process, on every process."""
        if self.world == 1:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, src=0)
        return texts[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def choose_device(name: str) -> torch.device:
    """The device of this process; ``auto`` takes CUDA where there is a CUDA device.

    Raises:
        ConfigError: the name is ``cuda`` and there is no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device",
            name,
            "cuda needs a CUDA device, none is visible",
            "Use device=auto or device=cpu.",
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each process its own device alone.
    return torch.device("cuda", this_place().local_rank % torch.cuda.device_count())


@contextmanager
def start(config: Config) -> Iterator[Mesh]:
    """Initialise process groups and Megatron-Core's parallel state, and destroy them at the end.

    ``parallel.tp`` divides the number of processes (``megamask.prepare.layout`` refuses others).

    Raises:
        ConfigError: the device cannot work here.
    """
    device, tp, world = choose_device(config.device), config.parallel.tp, this_place().world
    assert world % tp == 0
    _limit_threads(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with megatron_on_cpu(active=device.type == "cpu"):
        _join(device, world, config.parallel.timeout_minutes)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp, create_gloo_process_groups=device.type == "cuda"
            )
            if device.type == "cuda":
                tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
            yield Mesh(
                device=device,
                rank=dist.get_rank(),
                world=world,
                tp=tp,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                dp=world // tp,
                dp_rank=parallel_state.get_data_parallel_rank(),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _join(device: torch.device, world: int, timeout_minutes: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if world == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        dist.init_process_group(backend, timeout=timeout)


def _limit_threads(config: Config) -> None:
    """Divide the cores among the processes of this machine; torchrun would give each one thread."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(config.parallel.threads or max(1, available // local))


# Megatron-Core asks CUDA for the current device, names ``device="cuda"`` in factory calls,
# synchronises streams, and forks, saves and restores CUDA's random state around dropout and
# recomputation (a frozen model draws nothing from it). Without CUDA all of that is redirected.


class _FactoriesOnCpu(TorchFunctionMode):
    """Turn a ``cuda`` device argument of any torch call into ``cpu``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


@contextmanager
def megatron_on_cpu(active: bool) -> Iterator[None]:
    """Redirect CUDA requests to the CPU inside the block, when ``active``."""
    if not active:
        yield
        return
    current_device = patch.object(torch.cuda, "current_device", lambda: torch.device("cpu"))
    synchronize = patch.object(torch.cuda, "synchronize", lambda device=None: None)
    fork = patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: nullcontext())
    state = patch.multiple(
        random, _get_cuda_rng_state=lambda **_: None, _set_cuda_rng_state=lambda *_, **__: None
    )
    with current_device, synchronize, fork, state, _FactoriesOnCpu():
        yield
