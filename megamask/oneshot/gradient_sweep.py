"""One backward sweep of the dense model over the calibration samples, for all criteria that read
gradients.

Shapes: N samples, S sequence, O local out_features, I local in_features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.distributed as dist

from megamask.oneshot.layerwise import PruningJob
from megamask.oneshot.stats import GradientStats
from megamask.parallel.masked_linear import MaskedLinear
from megamask.terminal import is_reported

log = logging.getLogger(__name__)


def sweep(job: PruningJob, tokens_NS: torch.Tensor) -> dict[str, GradientStats]:
    """The sums of squared gradients of this rank's shard of every linear, by Megatron name.

    The loss of a sample is its mean cross entropy over S - 1 targets. Each sample has a pass of its
    own, because its gradients are squared before they are added. A gradient is added and freed as
    soon as it is there, so the sums (4 bytes a weight) and one gradient exist at a time. The result
    is in host memory: a card that holds the sums of all linears would lack them for every pass.
    Replicas share the samples, and their sums are added; every rank of a replica sees all of a
    sample's gradient at its shard. All ranks must call this function.

    Args:
        job: the dense model and the linears to prune.
        tokens_NS: the calibration samples, equal on all ranks.
    """
    mesh, begin = job.mesh, time.perf_counter()
    sums = {
        name: torch.zeros(linear.weight.shape, device=mesh.device)
        for name, linear in job.linears.items()
    }
    own = tokens_NS[mesh.dp_rank :: mesh.dp]
    with _added_to(sums, job.linears), _in_training(job.model), torch.enable_grad():
        for number, tokens_S in enumerate(own, start=1):
            tokens_BS = tokens_S[None].to(mesh.device)
            losses_BS = job.model.token_losses(tokens_BS, tokens_BS.roll(-1, dims=1))
            losses_BS[:, :-1].mean().backward()
            if mesh.is_main and is_reported(number, len(own)):
                seconds = time.perf_counter() - begin
                log.info("  gradients of sample %d/%d  %.1f s", number, len(own), seconds)
    for total_OI in sums.values() if mesh.dp > 1 else ():
        dist.all_reduce(total_OI, group=mesh.dp_group)
    samples = len(tokens_NS)
    return {name: GradientStats(sums.pop(name).cpu(), samples) for name in list(sums)}


@contextmanager
def _added_to(
    sums: Mapping[str, torch.Tensor], linears: Mapping[str, MaskedLinear]
) -> Iterator[None]:
    """Add the square of every gradient at the weights to ``sums`` inside the block."""
    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.weight.requires_grad_, False)
            linear.weight.requires_grad_(True)
            hook = partial(_add_square, sums[name])
            stack.callback(linear.weight.register_post_accumulate_grad_hook(hook).remove)
        yield


def _add_square(sum_OI: torch.Tensor, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    gradient_OI = weight.grad.float()
    sum_OI.addcmul_(gradient_OI, gradient_OI)
    weight.grad = None


@contextmanager
def _in_training(model: torch.nn.Module) -> Iterator[None]:
    """Training mode inside the block: Megatron recomputes activations in this mode alone."""
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)
