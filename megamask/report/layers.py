"""Per layer and linear kind: the density, and the share of groups of a mask that differ from the
mask it started from.

Shapes: K linear kinds, L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megamask.masks.file import MaskSet

_LAYER = re.compile(
    r"^(?:.*\.)?(\d+)\.(?:.*\.)?([^.]+)$"
)  # model.layers.3.mlp.down_proj -> 3, down_proj


@dataclass(frozen=True)
class LayerTable:
    """Figures of a mask by where its linears are.

    Attributes:
        kinds: names of the linear kinds, K, as they come in a layer.
        layers: how many layers, L: up to the last that has a mask.
        density_L: share of weights kept in a layer's linears of these kinds; a linear without a
            mask is dense.
        difference_KL: share of groups that differ from the prior mask; nan where that is not known.
            None without a prior.
    """

    kinds: list[str]
    layers: int
    density_L: list[float]
    difference_KL: list[list[float]] | None


def places_of(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Kind and layer of the linears that lie in one: ``model.layers.3.mlp.down_proj`` is
    (down_proj, 3).
    """
    return {name: (where[2], int(where[1])) for name in names if (where := _LAYER.match(name))}


def read_layers(masks: MaskSet, priors: MaskSet | None) -> LayerTable:
    """Read masks, and the prior masks to compare them with, one linear at a time.

    Raises:
        ArtifactError: a mask is corrupt.
    """
    places = places_of(masks)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    layers = max((layer for _, layer in places.values()), default=-1) + 1
    difference = (
        {places[name]: share_that_differs(masks, priors, name) for name in places}
        if priors is not None
        else None
    )
    return LayerTable(
        kinds=kinds,
        layers=layers,
        density_L=_density(masks, places, layers),
        difference_KL=[
            [difference.get((kind, layer), math.nan) for layer in range(layers)] for kind in kinds
        ]
        if difference
        else None,
    )


def share_that_differs(masks: MaskSet, priors: MaskSet, name: str) -> float:
    """Share of a linear's groups in which two masks are not the same; nan if the other has none of
    this pattern and shape.
    """
    if (
        name not in priors
        or masks.pattern != priors.pattern
        or masks.shape(name) != priors.shape(name)
    ):
        return math.nan
    return float((masks.index(name) != priors.index(name)).float().mean())


def _density(masks: MaskSet, places: Mapping[str, tuple[str, int]], layers: int) -> list[float]:
    """Kept share by layer, linears of a kind being of one size."""
    size = {places[name][0]: math.prod(masks.shape(name)) for name in places}
    masked = set(places.values())
    total = sum(size.values())
    kept = [
        sum(
            size[kind] * (masks.pattern.density if (kind, layer) in masked else 1.0)
            for kind in size
        )
        for layer in range(layers)
    ]
    return [weights / total for weights in kept]
