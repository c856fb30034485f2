"""Where in a model the masks of a file belong, and whether its weights are those of the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from megamask.errors import ArtifactError
from megamask.masks.held_model import Place, Shapes, find_places, nearest
from megamask.masks.obstacles import Obstacle, first_obstacle
from megamask.masks.shapes_fit import check_shapes
from megamask.weights.fingerprint import Row, fingerprint, is_linear, model_linears, weight_OI

Weight = Callable[[nn.Module], Tensor]


def fitting_places(model: nn.Module, path: Path | str, shapes: Shapes) -> list[Place]:
    """The places of the model where every mask finds a linear of its shape, of which at least one
    can be written.

    Args:
        model: the model.
        path: of the masks, for messages.
        shapes: name of a mask -> (O, I).

    Raises:
        ArtifactError: there is none; the message says what the model has in that place.
    """
    places = find_places(model, shapes)
    found = [first_obstacle(model, place.targets) for place in places]
    if found and all(found):
        refuse_obstacle(path, found)
    free = (place for place, problem in zip(places, found, strict=True) if not problem)
    targets = next((place.targets for place in free), {})  # the places are alike in what they have
    missing = [name for name in shapes if name not in targets]
    here = {name: tuple(weight_OI(module).shape) for name, module in targets.items()}
    near = nearest(model, missing[0]) if missing else ""
    check_shapes(path, shapes, here, type(model).__name__, near)
    return places


def refuse_obstacle(path: Path | str, found: Iterable[Obstacle | None]) -> None:
    """Raise the first of the obstacles as an ArtifactError, if there is one."""
    if first := next(filter(None, found), None):
        raise ArtifactError(path, *first)


def is_base(model: nn.Module, place: Place, known: Sequence[str], weight: Weight) -> bool:
    """Whether the weights have one of the ``known`` fingerprints.

    A fingerprint covers all linears of the text model. Where a larger model adds linears of its
    own, those of the masks alone may be what was covered, or those of the whole model outside its
    head. The last tells nothing of a place whose linears have other names in the model than in the
    masks.
    """
    own = {name: module for name, module in place.targets.items() if is_linear(module)}
    whole = model_linears(model)
    is_named_so = all(whole.get(name) is module for name, module in place.targets.items())
    for linears in (place.base, own, *([whole] if is_named_so else [])):
        if first_obstacle(model, linears):
            continue
        shapes = {name: tuple(weight_OI(linear).shape) for name, linear in linears.items()}
        if fingerprint(shapes, _rows(linears, weight)) in known:
            return True
    return False


def _rows(linears: Mapping[str, nn.Module], weight: Weight) -> Row:
    return lambda name, row: weight(linears[name])[row]
