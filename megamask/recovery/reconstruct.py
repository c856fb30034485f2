"""Recovery by least squares, layer by layer: the inputs of a layer come from the recovered layers
before it, and its kept weights are fitted to the outputs that its dense weights have on them.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from megamask.config import Config
from megamask.data.heldout import calibration_description, calibration_tokens
from megamask.oneshot.calibrate import HiddenStates, input_stats
from megamask.oneshot.layerwise import naming, warn_of_unseen
from megamask.oneshot.stats import InputStats
from megamask.parallel.masked_linear import MaskedLinear
from megamask.recovery.layer_by_layer import ERRORS, Made, recover_layers
from megamask.recovery.least_squares import DAMP, SOLVERS, output_error, solve
from megamask.recovery.recovery import Recovered, Recovery, RecoveryJob, kept_weights

log = logging.getLogger(__name__)


class Reconstruct(Recovery):
    """Least squares of each linear (``least_squares.py``) on the calibration samples."""

    reads = ("solver", "damp")

    def lengths(self) -> tuple[str, ...]:
        """Those of the calibration samples."""
        return ("calibration.seq_length",)

    def text(self, config: Config) -> dict[str, Any]:
        """The calibration samples."""
        return {"calibration": calibration_description(config)}

    def recover(self, job: RecoveryJob) -> Recovered:
        """As ``reconstruct``, on the samples of ``calibration``."""
        return reconstruct(job, calibration_tokens(job.config))


@torch.no_grad()
def reconstruct(job: RecoveryJob, tokens_NS: torch.Tensor) -> Recovered:
    """Each layer runs twice on all samples: dense, for the statistics of the inputs of its
    linears, and recovered, for the inputs of the next layer. ``measured`` has, for each decoder
    layer with masks, the squared error of the outputs of its linears in units of the outputs'
    mean square, of the dense weights under the mask (``masked``) and of the recovered weights.
    """
    states = HiddenStates(job.model, tokens_NS, job.config.calibration.micro_batch, job.mesh)
    return recover_layers(job, states, partial(_layer, job, states))


def _layer(
    job: RecoveryJob,
    states: HiddenStates,
    layer: torch.nn.Module,
    own: dict[str, MaskedLinear],
) -> Made:
    """The weights of the linears of a layer, and the errors of their outputs."""
    mesh, weights_OI = job.mesh, {}
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    with input_stats(own, True, mesh, job.config.parallel.sequence_parallel) as stats:
        states.feed(layer, own.values())
    warn_of_unseen(job, stats)
    for name in own:
        weights_OI[name], of_linear = _linear(job, name, stats.pop(name))
        sums += of_linear
    dense, *errors = sums.tolist()
    relative = [float(f"{error / (dense or 1):.4g}") for error in errors]
    return weights_OI, dict(zip(ERRORS, relative, strict=True))


def _linear(job: RecoveryJob, name: str, stats: InputStats) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's shard of the weights of a linear, and the sums of the squares of the dense
    outputs and of ``ERRORS`` over the whole linear, (3,) fp64.

    The columns of a row depend on each other, so the ranks gather a weight that is split over its
    columns, and divide its rows among them.
    """
    mesh, linear = job.mesh, job.linears[name]
    dense_OI, mask_OI = linear.weight.detach(), job.masks_OI[name].to(mesh.device)
    is_split = linear.shard_axis == 1 and mesh.tp > 1
    if is_split:
        dense_OI = _rows_of_rank(job, dense_OI, 0)
        mask_OI = _rows_of_rank(job, mask_OI.byte(), 1).bool()  # such a row stays as it is
    settings = job.config.recover
    with naming(hf_names := job.hf_names(name)):
        hessian_II = stats.hessian_II
        solved_OI, damp = solve(
            SOLVERS[settings.solver], dense_OI, mask_OI, hessian_II, settings.damp, mesh.any
        )
    if damp != settings.damp and mesh.is_main:
        said = "%s: %s=%g is too little, used %g; more calibration tokens would help"
        log.warning(said, hf_names, DAMP, settings.damp, damp)
    new_OI = kept_weights(solved_OI, mask_OI, job.dtype)
    zeros_OI, masked_OI = torch.zeros_like(dense_OI), torch.where(mask_OI, dense_OI, 0)
    errors = [output_error(one, dense_OI, hessian_II) for one in (zeros_OI, masked_OI, new_OI)]
    sums = torch.stack(errors)
    if is_split:
        rows = linear.weight.shape[0]
        whole_OI = torch.cat(mesh.gather_over_tp(new_OI))[:rows]
        new_OI = whole_OI.chunk(mesh.tp, dim=1)[mesh.tp_rank]
    return new_OI.cpu().contiguous(), mesh.sum_over_tp(sums)


def _rows_of_rank(job: RecoveryJob, shard_OI: torch.Tensor, filler: int) -> torch.Tensor:
    """Equally many whole rows for each rank, of a matrix that is split over its columns; rows of
    ``filler`` follow the last row.
    """
    mesh = job.mesh
    whole_OI = torch.cat(mesh.gather_over_tp(shard_OI), dim=1)
    rows = -(-len(whole_OI) // mesh.tp)
    lacking = (0, 0, 0, rows * mesh.tp - len(whole_OI))
    padded_OI = torch.nn.functional.pad(whole_OI, lacking, value=filler)
    return padded_OI.chunk(mesh.tp)[mesh.tp_rank]
