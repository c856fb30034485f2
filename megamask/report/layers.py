"""Facts of a mask by layer and by kind of linear.

The facts are the density, and the share of groups that differ from the prior mask, from which
learning started.

Shapes: K linear kinds, L layers.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megamask.masks.file import MaskSet

# model.layers.3.mlp.down_proj -> 3, down_proj; of experts, experts.down_proj
_LAYER = re.compile(
    r"^(?:[^.]*\.)*?(\d+)\.(?:.*?\.)?((?:experts\.\d+|shared_expert)\.[^.]+|[^.]+)$"
)


@dataclass(frozen=True)
class LayerTable:
    """Density and difference of a mask by layer and by kind of linear.

    Attributes:
        kinds: names of the K linear kinds, in the order of a layer.
        layers: number of layers L, up to the last layer that has a mask.
        density_L: share of kept weights in a layer's linears of these kinds; a linear without a
            mask is dense.
        difference_KL: share of groups that differ from the prior mask, nan where it is not known;
            None without a prior mask.
    """

    kinds: list[str]
    layers: int
    density_L: list[float]
    difference_KL: list[list[float]] | None


def places_of(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Name -> (kind, layer), for the linears that lie in a numbered layer.

    For example ``model.layers.3.mlp.down_proj`` -> (down_proj, 3), and
    ``model.layers.3.mlp.experts.7.down_proj`` -> (experts.down_proj, 3).
    """
    found = ((name, _LAYER.match(name)) for name in names)
    return {
        name: (re.sub(r"\.\d+\.", ".", match[2]), int(match[1])) for name, match in found if match
    }


def read_layers(masks: MaskSet, priors: MaskSet | None) -> LayerTable:
    """Read masks and compare them with the prior masks, one linear at a time.

    Raises:
        ArtifactError: a mask is corrupt.
    """
    places = places_of(masks)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    layers = max((layer for _, layer in places.values()), default=-1) + 1
    difference_KL = None
    if priors is not None and places:
        grouped: dict[tuple[str, int], list[float]] = {}
        for name, place in places.items():  # the experts of a layer share a place
            grouped.setdefault(place, []).append(share_that_differs(masks, priors, name))
        shares = {place: sum(some) / len(some) for place, some in grouped.items()}
        difference_KL = [
            [shares.get((kind, layer), math.nan) for layer in range(layers)] for kind in kinds
        ]
    return LayerTable(kinds, layers, _density(masks, places, layers), difference_KL)


def share_that_differs(masks: MaskSet, priors: MaskSet, name: str) -> float:
    """Share of a linear's groups in which two masks differ.

    The share is nan where the prior has no mask of the same pattern and shape.
    """
    if (
        name not in priors
        or masks.patterns[name] != priors.patterns[name]
        or masks.shape(name) != priors.shape(name)
    ):
        return math.nan
    return float((masks.index(name) != priors.index(name)).float().mean())


def _density(masks: MaskSet, places: Mapping[str, tuple[str, int]], layers: int) -> list[float]:
    """Share of kept weights by layer; all linears of a kind have the same size. A layer has as many
    experts of a kind as the layer with the most masks of that kind, and has either experts or one
    feed-forward part.
    """
    masked = Counter(places.values())
    number: Counter[str] = Counter()
    for (kind, _), count in masked.items():
        number[kind] = max(number[kind], count)
    size = {kind: math.prod(masks.shape(name)) for name, (kind, _) in places.items()}
    removed: dict[tuple[str, int], float] = defaultdict(float)
    for name, place in places.items():
        removed[place] += math.prod(masks.shape(name)) * (1 - masks.patterns[name].density)
    kept = []
    for layer in range(layers):
        here = {(_is_of_experts(kind), _leaf(kind)) for kind in size if masked[kind, layer]}
        there = [kind for kind in size if (not _is_of_experts(kind), _leaf(kind)) not in here]
        total = sum(size[kind] * number[kind] for kind in there)
        kept.append(1 - sum(removed[kind, layer] for kind in there) / total)
    return kept


def _is_of_experts(kind: str) -> bool:
    """Whether linears of this kind are parts of experts, shared experts included."""
    return "." in kind


def _leaf(kind: str) -> str:
    return kind.rpartition(".")[2]
