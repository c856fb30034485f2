"""The loop of the methods that recover one decoder layer after the other. The inputs of a layer
come from the recovered layers before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from megamask.oneshot.calibrate import HiddenStates
from megamask.parallel.masked_linear import MaskedLinear
from megamask.recovery.recovery import Recovered, RecoveryJob

# Of a layer's outputs, relative: with the dense weights under the mask, and with the new weights.
ERRORS = ("masked", "recovered")
# The new weights by Megatron name, in host memory, and the errors of a layer.
Made: TypeAlias = tuple[dict[str, torch.Tensor], dict[str, float]]


@torch.no_grad()
def recover_layers(
    job: RecoveryJob,
    states: HiddenStates,
    make: Callable[[torch.nn.Module, dict[str, MaskedLinear]], Made],
    enter: Callable[[torch.nn.Module], None] | None = None,
) -> Recovered:
    """Recover every layer that has masks, or take it from a run that was killed. All ranks must
    call this function. ``measured`` has the errors of these layers, in order.

    Args:
        job: the model and the masks.
        states: the inputs of the first layer.
        make: recovers a layer, given its linears that have a mask.
        enter: called with each layer first, whatever becomes of it.
    """
    found = Recovered()
    errors: dict[str, list[float]] = {kind: [] for kind in ERRORS}
    for number, (layer, own, is_last) in enumerate(job.layers(), start=1):
        if enter is not None:
            enter(layer)
        if own:
            part = f"layer-{number:04d}"
            made = job.unfinished.load(part)
            if made is None:
                made = make(layer, own)
                job.unfinished.save(part, *made)
            weights_OI, of_layer = made
            for name, weight_OI in weights_OI.items():
                own[name].folded_weight = weight_OI.to(own[name].weight)
            found.weights_OI |= weights_OI
            for kind in ERRORS:
                errors[kind].append(of_layer[kind])
        if not is_last:
            states.advance(layer)
    found.measured["output_error"] = errors
    return found
