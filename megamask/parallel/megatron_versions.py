"""Everything that differs between the versions of Megatron-Core that megamask runs with, 0.16 to
0.19, and what lets each of them run without CUDA.

- What is no tensor goes to ``common.pt``; from 0.19 on, to a pickle among the tensors.
  ``request_save`` always writes ``common.pt``, so every version reads what another wrote.
- Saves in the background are Megatron's own; from 0.17 on, those of another package unless told
  ``mcore``. ``request_save`` tells it.
- The queue of what writers tell has another name from 0.17 on, and the error of a writer is then
  the name of its class alone. ``results_go_through`` knows both names and passes the error on.
- A sum of gradients asks for the current CUDA stream from 0.19 on. ``megatron_on_cpu`` gives one.
- Norms of queries and keys in a spec need ``qk_layernorm`` from 0.18 on.
  ``megamask/model/build.py`` sets it, which changes nothing with older versions.
- ``_forward_impl`` of a linear gets ``gtp_remat_size`` from 0.19 on. The masked linears pass every
  argument on.

megamask/megatron_range.py names the versions; it comes first, and imports nothing of Megatron.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import random
from torch.overrides import TorchFunctionMode

from megamask.safe_checkpoint import COMMON

# Megatron logs warnings that a user can do nothing about; 0.19 says at each start that GPTModel is
# to go.
logging.getLogger("megatron.core").setLevel(logging.ERROR)

FORMAT = ("torch_dist", 1)  # the one format of all versions
QUEUES = ("_get_write_results_queue", "get_write_results_queue")


# Checkpoints


def request_save(state: dict[str, Any], folder: Path) -> Any:
    """Prepare to save a sharded state into ``folder``, which is empty: Megatron's ``AsyncRequest``,
    whose ``execute_sync`` writes the tensors, or which an ``AsyncCallsQueue`` takes.

    What is no tensor is written at once, to ``common.pt``. ``dist_checkpointing.save`` of 0.19
    would put it into a pickle among the tensors, which older versions cannot read, and which
    PyTorch unpickles without restriction. All ranks must call this function.

    Tensors of a GPU are copied to pageable memory, which the operating system has back when they
    are written. Megatron asks for page-locked memory: PyTorch rounds each such tensor up to a power
    of two and keeps its memory to the end of the process.
    """
    tensors, common = save_preprocess(state, True)
    if dist.get_rank() == 0:
        torch.save(common, folder / COMMON)
    strategy = TorchDistSaveShardedStrategy(*FORMAT)
    mine = {"async_strategy": "mcore"} if _takes(strategy.async_save, "async_strategy") else {}
    request = strategy.async_save(tensors, folder, **mine)
    request.finalize_fns.append(partial(_write_format, folder))
    if request.preload_fn is None:  # this rank has nothing to write
        return request
    # From 0.16 to 0.19 the second argument of the writer is what Megatron copies to the host.
    buckets = request.async_fn_args[1]
    copy = partial(FileSystemWriterAsync.preload_tensors, buckets, non_blocking=False)
    return request._replace(preload_fn=copy)


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _write_format(folder: Path) -> None:
    if dist.get_rank() == 0:
        save_config(CheckpointingConfig(*FORMAT), str(folder))
    dist.barrier()


@contextmanager
def results_go_through(make_queue: Callable[[], Any]) -> Iterator[None]:
    """Let Megatron's writer collect the results of a save in a queue of ours.

    Megatron keeps the queue in a process of its own, since its saves may go on in the background:
    at the first save every rank starts an interpreter that imports torch. A save in the foreground
    fills and empties the queue in one process.

    From 0.17 on a writer that fails tells the class of its error alone. The error itself, which
    says whether the disk is full, goes in its place.
    """
    write, errors = FileSystemWriterAsync.write_preloaded_data, []

    @wraps(write)
    def watched(*args: Any, **kwargs: Any) -> Any:
        told = write(*args, **kwargs)
        if isinstance(told, tuple) and isinstance(told[1], Exception):
            errors.append(told[1])  # in the process that writes, which is also the one that tells
        return told

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(watched))
        )
        for name in QUEUES:
            if hasattr(filesystem_async, name):
                stack.enter_context(
                    patch.object(filesystem_async, name, lambda: _Results(make_queue(), errors))
                )
        yield


class _Results:
    """A queue that tells the first of ``errors`` in the place of the error that is put into it."""

    def __init__(self, queue: Any, errors: list[Exception]) -> None:
        self._queue, self._errors = queue, errors

    def put(self, results: Any) -> None:
        """Write the results."""
        if isinstance(results, Exception) and self._errors:
            results = self._errors[0]
        self._queue.put(results)

    def get_nowait(self) -> Any:
        """Read the results."""
        return self._queue.get_nowait()


# Without CUDA
#
# Megatron-Core asks CUDA for the current device and stream, names ``device="cuda"`` in factory
# calls, synchronises streams, and forks, saves and restores CUDA's random state around dropout and
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


class _NoStream:
    """The current stream where there is none: a CPU does one thing after the other."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""


@contextmanager
def megatron_on_cpu(active: bool) -> Iterator[None]:
    """Redirect CUDA requests to the CPU inside the block, when ``active``."""
    if not active:
        yield
        return
    cuda = patch.multiple(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        current_stream=lambda device=None: _NoStream(),
        synchronize=lambda device=None: None,
    )
    fork = patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: nullcontext())
    state = patch.multiple(
        random, _get_cuda_rng_state=lambda **_: None, _set_cuda_rng_state=lambda *_, **__: None
    )
    with cuda, fork, state, _FactoriesOnCpu():
        yield
