"""Recovery layer by layer by gradient descent: the kept weights of a decoder layer are trained so
that its outputs come near to the outputs of the dense layer.

Two streams of hidden states run through the model on the calibration samples: the dense model's,
and those of the recovered layers so far. A layer takes the recovered states and learns to give the
dense ones, so it also makes up for what the layers before it lost. Against least squares of each
linear (``reconstruct.py``) it sees the whole layer, with attention and activation.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from megamask.config import Config
from megamask.data.heldout import calibration_description, calibration_tokens
from megamask.errors import ConfigError, LearningError
from megamask.oneshot.calibrate import HiddenStates
from megamask.parallel.masked_linear import MaskedLinear
from megamask.prepare.run_inputs import RunInputs
from megamask.recovery.layer_by_layer import ERRORS, Made, recover_layers
from megamask.recovery.recovery import Recovered, Recovery, RecoveryJob, kept_weights
from megamask.recovery.trained_weights import KeptWeights
from megamask.recovery.training import share_of_rate

log = logging.getLogger(__name__)
RATE = 1e-4  # where recover.rate is null


class Blockwise(Recovery):
    """Adam on the kept weights of one decoder layer after the other."""

    reads = ("steps", "rate")

    def check_early(self, inputs: RunInputs) -> None:
        """Refuse several ranks: their gradients would have to be added.

        Raises:
            ConfigError: there are several.
        """
        layout = inputs.layout
        if layout.tp * layout.dp > 1:
            allowed = "one process: blockwise recovery is built for one device"
            fix = "Start it without torchrun, or set recover.method=reconstruct."
            raise ConfigError("recover.method", "blockwise", allowed, fix)

    def lengths(self) -> tuple[str, ...]:
        """Those of the calibration samples."""
        return ("calibration.seq_length",)

    def text(self, config: Config) -> dict[str, Any]:
        """The calibration samples, of which ``calibration.micro_batch`` make a step."""
        description = calibration_description(config)
        return {"calibration": {**description, "micro_batch": config.calibration.micro_batch}}

    @torch.no_grad()
    def recover(self, job: RecoveryJob) -> Recovered:
        """``measured`` has the error of each decoder layer with masks, in units of the mean square
        of what the dense layer adds to its inputs: with the dense weights under the mask, and
        recovered. A layer whose error would rise keeps its weights.
        """
        tokens_NS, batch = calibration_tokens(job.config), job.config.calibration.micro_batch
        dense = HiddenStates(job.model, tokens_NS, batch, job.mesh)
        states = HiddenStates(job.model, tokens_NS, batch, job.mesh)
        before: list[torch.Tensor] = []  # the dense inputs of the layer

        def enter(layer: torch.nn.Module) -> None:
            before[:] = dense.batches
            dense.advance(layer)

        def make(layer: torch.nn.Module, own: dict[str, MaskedLinear]) -> Made:
            return _layer(job, states, dense.batches, before, layer, own)

        return recover_layers(job, states, make, enter)


def _layer(
    job: RecoveryJob,
    states: HiddenStates,
    goals: list[torch.Tensor],
    before: list[torch.Tensor],
    layer: torch.nn.Module,
    own: dict[str, MaskedLinear],
) -> Made:
    """The weights of the linears of a layer, and its errors.

    Args:
        job: the model and the masks.
        states: the inputs of the layer when the layers before it are recovered.
        goals: the outputs of the dense layer on the dense inputs, a tensor for each micro-batch.
        before: the dense inputs.
        layer: the layer.
        own: its linears that have a mask.
    """
    section = job.config.recover
    trained = {name: KeptWeights(linear, job.masks_OI[name]) for name, linear in own.items()}
    parameters = [one for weight in trained.values() for one in weight.parameters]
    optimizer = torch.optim.Adam(parameters, lr=1.0, foreach=False)
    added = [
        (goal - start).float().square().mean() for goal, start in zip(goals, before, strict=True)
    ]
    scale = torch.stack(added).mean().clamp(min=torch.finfo(torch.float32).tiny)

    def use() -> None:
        for name, linear in own.items():
            linear.step_weight = trained[name].weight().to(linear.weight.dtype)

    def error(number: int) -> torch.Tensor:
        output_SBH = states.output(layer, number)
        return (output_SBH.float() - goals[number].float()).square().mean() / scale

    @torch.no_grad()
    def whole_error() -> float:
        use()
        mean = torch.stack([error(number) for number in range(len(goals))]).mean()
        return float(f"{float(mean):.4g}")

    losses: list[torch.Tensor] = []  # read after the last step: the host waits for none
    try:
        masked = whole_error()
        with torch.enable_grad():
            for step in range(section.steps):
                use()
                optimizer.zero_grad(set_to_none=True)
                loss = error(step % len(goals))
                losses.append(loss.detach())
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = (section.rate or RATE) * share_of_rate(step, section.steps)
                optimizer.step()
        for step, value in enumerate(torch.stack(losses).tolist()):
            if not math.isfinite(value):
                said = f"the error of a layer is {value} after step {step}, not finite. "
                fix = "Lower recover.rate: recovery starts anew then, at the first layer."
                raise LearningError(said + fix)
        recovered = whole_error()
        if not recovered <= masked:  # Adam promises nothing
            log.warning(
                "layer %s: its error did not fall, so its kept weights stay", next(iter(own))
            )
            trained = {name: KeptWeights(one, job.masks_OI[name]) for name, one in own.items()}
            recovered = masked
    finally:
        for linear in own.values():
            linear.step_weight = None
    weights_OI = {
        name: kept_weights(one.weight(), job.masks_OI[name], job.dtype).cpu().contiguous()
        for name, one in trained.items()
    }
    return weights_OI, dict(zip(ERRORS, (masked, recovered), strict=True))
