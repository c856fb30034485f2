"""Process groups and the device of this process, from the launcher's environment."""

from __future__ import annotations

import datetime
import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megamask.config import Config, run_paths
from megamask.config.nested import flatten, what_differs
from megamask.errors import (
    EXIT_BUG,
    EXIT_UNAVAILABLE,
    EXIT_USER_ERROR,
    ConfigError,
    DismissedError,
    LaunchError,
    MegamaskError,
    OtherRankError,
    shown,
)
from megamask.machine_errors import explained, may_pass
from megamask.parallel.determinism import deterministic
from megamask.parallel.megatron_versions import megatron_on_cpu
from megamask.parallel.roll_call import Roll, call_roll
from megamask.process.cores import usable_cores
from megamask.process.network import choose_interface
from megamask.process.place import Place, this_place
from megamask.process.signals import StopRequest
from megamask.process.watchdog import Watchdog

Value = TypeVar("Value")


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

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A ``tensor`` of the host on the device of this process. A copy to CUDA starts from pinned
        memory, without which the host would wait until the device has done all work before it.
        """
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

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

    def from_main(self, value: Value) -> Value:
        """The ``value`` of rank 0, on every rank.

        Whatever decides about collective work is decided on rank 0: ranks that decide for
        themselves may see files at other times and round differently, and then wait for each other.
        """
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_to_main(self, value: Value) -> list[Value]:
        """The values of all ranks in their order, on rank 0; an empty list on the others."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values if self.is_main else []

    def require_same(self, what: str, value: Any) -> None:
        """Check that all ranks have the ``value`` of rank 0, before collective work that follows
        from the value.

        Raises:
            LaunchError: on rank 0, another rank has another value.
            DismissedError: on the other ranks.
        """
        first = self.from_main(value)
        differs = first != value
        if not self.any(differs):
            return
        found: list[str | None] = [None] * self.world
        own = f"rank {self.rank} on {socket.gethostname()} has other {what} than rank 0: "
        dist.all_gather_object(found, own + _difference(value, first) if differs else None)
        if not self.is_main:
            raise DismissedError(f"a rank has other {what}", LaunchError.code)
        raise LaunchError(
            f"{next(filter(None, found))}. A network file system may show new files late: start "
            "again."
        )

    def leave_together(self, failure: Exception | None, what: str) -> None:
        """Leave on all ranks where any brings a failure, before work that needs all of them. All
        ranks must call this method. Rank 0 tells the failure: a launcher ends the ranks that are
        left as soon as the first has left.

        Args:
            failure: of this rank; None where its work went well.
            what: what a rank could not do, for the ranks that have nothing to tell.

        Raises:
            Exception: ``failure``, on rank 0 if it brings one.
            OtherRankError: on rank 0, the first failure of another rank, told in its words.
            DismissedError: on the others.
        """
        if not self.any(failure is not None):
            return
        words, is_bug = "", False
        if failure is not None:
            known = failure if isinstance(failure, MegamaskError) else explained(failure)
            words = str(known or "".join(traceback.format_exception(failure)))
            is_bug = known is None
        told = self.gather_to_main((self.rank, socket.gethostname(), words))
        code = EXIT_BUG if self.any(is_bug) else EXIT_USER_ERROR
        code = EXIT_UNAVAILABLE if self.any(may_pass(failure)) else code
        if not self.is_main:
            raise DismissedError(f"a rank could not {what}", code) from failure
        rank, host, words = next(one for one in told if one[2])
        raise failure or OtherRankError(rank, host, words, code)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def _difference(own: Any, first: Any) -> str:
    """Two values where they differ; of mappings, the first key and its values."""
    if not (isinstance(own, Mapping) and isinstance(first, Mapping)):
        return f"{shown(own)}, on rank 0 {shown(first)}"
    where = what_differs(first, own).partition(", ")[0]
    ours, theirs = (flatten(values).get(where) for values in (own, first))
    return f"{where} = {shown(ours)}, on rank 0 {shown(theirs)}"


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
def start(
    config: Config, stop: StopRequest | None = None, place: Place | None = None
) -> Iterator[Mesh]:
    """Initialise process groups and Megatron-Core's parallel state, and destroy them at the end.

    ``parallel.tp`` divides the number of processes (``megamask.prepare.layout`` refuses others).
    After an error the groups of several ranks are left as they are: their end would wait for the
    other ranks before anybody reads the error.

    Args:
        config: the settings.
        stop: a request to stop, read until all ranks have come.
        place: of this process; None asks the launcher's environment.

    Raises:
        ConfigError: the device cannot work here, or the ranks have different settings.
        LaunchError: a rank did not come, or ended inside the block.
        Interrupted: a signal came while ranks were missing.
    """
    place = place or this_place()
    assert place.world % config.parallel.tp == 0
    device = choose_device(config.device)
    with (
        deterministic(config.deterministic, device),
        megatron_on_cpu(active=device.type == "cpu"),
        _lost_ranks_named(config, place),
    ):
        mesh = _join(config, place, device, stop or StopRequest())
        try:
            yield mesh
        except BaseException:
            if place.world == 1:
                _part()
            raise
        _part()


def _join(config: Config, place: Place, device: torch.device, stop: StopRequest) -> Mesh:
    section = config.parallel
    roll = call_roll(place, config, stop) if place.world > 1 else Roll(dist.HashStore(), sharers=1)
    torch.set_num_threads(section.threads or max(1, len(usable_cores()) // roll.sharers))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    choose_interface(place)
    watchdog = Watchdog(run_paths(config).learn / "logs", place)
    with watchdog.watching():
        if place.world > 1:
            watchdog.expect("connection to the other ranks", 60.0 * section.start_minutes)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=roll.store,
            rank=place.rank,
            world_size=place.world,
            timeout=datetime.timedelta(minutes=section.timeout_minutes),
            # Without it NCCL's barriers guess the device from the rank in the whole run.
            device_id=device if device.type == "cuda" else None,
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=section.tp,
            create_gloo_process_groups=device.type == "cuda",
            distributed_timeout_minutes=section.timeout_minutes,
        )
        mesh = Mesh(
            device=device,
            rank=place.rank,
            world=place.world,
            tp=section.tp,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            dp=place.world // section.tp,
            dp_rank=parallel_state.get_data_parallel_rank(),
        )
        # A backend connects at its first call. A connection that cannot be made shows here.
        mesh.sum_over_tp(torch.zeros(1, device=device))
        mesh.mean_over_dp(torch.zeros(1, device=device))
        mesh.any(False)
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
    return mesh


def _part() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextmanager
def _lost_ranks_named(config: Config, place: Place) -> Iterator[None]:
    """Turn the errors that backends raise when another rank is gone into errors of the launch."""
    try:
        yield
    except (RuntimeError, MegamaskError) as error:
        lost = _lost_rank(error)
        if place.world == 1 or lost is None:
            raise
        raise LaunchError(
            f"another rank ended, or gave no answer for {config.parallel.timeout_minutes} minutes "
            f"(parallel.timeout_minutes). Its own output says why; start again to go on. "
            f"({str(lost).splitlines()[0]})"
        ) from error


def _lost_rank(error: BaseException | None) -> BaseException | None:
    """The error of the backend that ``error`` is, or that caused it."""
    while error is not None:
        is_backend = isinstance(error, dist.DistError) or "gloo" in str(error)
        if isinstance(error, RuntimeError) and is_backend:
            return error
        error = error.__cause__
    return None
