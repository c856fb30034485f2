"""The weights of the base model, for masks that are stored as differences from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megamask.errors import ArgumentError, ArtifactError
from megamask.masks.arguments import as_path
from megamask.masks.held_model import Shapes
from megamask.masks.places import fitting_places, is_base
from megamask.masks.shapes_fit import check_shapes
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import weight_OI
from megamask.weights.mapping import linear_shapes

Weights = Callable[[str], Tensor]
"""``weights(name)`` returns the weight (O, I) of a linear."""

LACKS = "stores masks as differences from the weights of their base model, which are not given"
GIVE = (
    "Pass load_masks(path, model=...) the model or its Hugging Face folder, set model.hf, or run "
    "megamask extract MASK FILE --coding uniform model.hf=...: that file needs no model."
)
UNCHANGED = "Use the model that the mask was made for, with its weights unpruned and unchanged."


def weights_of(
    argument: str, model: Any, path: Path, shapes: Shapes, fingerprints: Sequence[str]
) -> Weights:
    """The weights of a model that masks were made for.

    Args:
        argument: the function and its argument, for the message.
        model: a loaded transformers model, the path of its Hugging Face folder, or a ``BaseModel``.
        path: of the masks, for messages.
        shapes: name of a mask -> (O, I).
        fingerprints: those that the model may have.

    Raises:
        ArgumentError: ``model`` is something else.
        ArtifactError: the model is another one, is damaged, or has no linear of a mask's name and
            shape.
    """
    if isinstance(model, BaseModel):
        return stored_weights(model, path, shapes, fingerprints)
    if not isinstance(model, nn.Module):
        try:
            folder = as_path(argument, model)
        except ArgumentError:
            allowed = "a loaded model or the path of its Hugging Face folder is needed"
            raise ArgumentError(argument, model, allowed) from None
        return stored_weights(BaseModel(folder), path, shapes, fingerprints)
    for place in fitting_places(model, path, shapes):
        if is_base(model, place, fingerprints, weight_OI):
            targets = place.targets
            return lambda name: weight_OI(targets[name])
    raise _another(path, f"this {type(model).__name__}", fingerprints)


def stored_weights(
    base: BaseModel, path: Path, shapes: Shapes, fingerprints: Sequence[str]
) -> Weights:
    """As ``weights_of``, for weights on disk; a weight is read when it is asked for."""
    check_shapes(path, shapes, linear_shapes(base.architecture()))
    if base.fingerprints().exact not in fingerprints:
        raise _another(path, str(base.place), fingerprints)
    source = base.open()
    return lambda name: source.tensor(f"{name}.weight")


def _another(path: Path, model: str, fingerprints: Sequence[str]) -> ArtifactError:
    known = fingerprints[0][:12] if fingerprints else "unknown"
    problem = f"was made for another base model than {model} (fingerprint {known})"
    return ArtifactError(path, problem, UNCHANGED)
