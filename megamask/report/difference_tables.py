"""The differences of two sets of masks by layer and by kind of linear: tables, JSON, a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.errors import ConfigError
from megamask.masks.compare import Difference, chance
from megamask.masks.file import MaskSet
from megamask.report.layers import places_of
from megamask.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOWHERE = "–"  # stands for the layer of a linear that lies in no layer
ALL = "**all**"
COLUMNS = {
    "groups_differ": "groups differ",
    "weights_differ": "weights differ",
    "kept_by_both": "kept by both",
}

Differences = Mapping[str, Difference]
"""HF module name -> difference of the two masks of the linear."""


def lines(a: MaskSet, b: MaskSet, differences: Differences) -> list[str]:
    """The text of the verb diff: a table by layer, a table by kind, and notes."""
    return [
        f"A  {_title(a)}",
        f"B  {_title(b)}",
        "",
        *_layer_table(differences, main_share(a, b)),
        "",
        *_kind_table(differences),
        "",
        *notes(a, b),
    ]


def _layer_table(differences: Differences, main: str) -> list[str]:
    """All shares of each layer, and the share ``main`` for each kind of linear in it."""
    kinds, places = by_kind(differences), places_of(differences)

    def row(title: str, inside: Differences) -> list[str]:
        cells = []
        for kind in kinds:
            of_kind = [found for name, found in inside.items() if _kind(name, places) == kind]
            cells.append(_percent(total(of_kind).shares()[main]) if of_kind else NOWHERE)
        return [title, *_shares(total(inside.values())), *cells]

    rows = [row(layer, inside) for layer, inside in by_layer(differences).items()]
    return table(["layer", *COLUMNS.values(), *kinds], [*rows, row(ALL, differences)])


def _kind_table(differences: Differences) -> list[str]:
    """The number of linears and all shares of each kind of linear."""

    def row(title: str, inside: Differences) -> list[str]:
        return [title, f"{len(inside):,}", *_shares(total(inside.values()))]

    rows = [row(kind, inside) for kind, inside in by_kind(differences).items()]
    return table(["kind", "linears", *COLUMNS.values()], [*rows, row(ALL, differences)])


def notes(a: MaskSet, b: MaskSet) -> list[str]:
    """Sentences that say how to read the shares, and which linears are not compared."""
    said = ", ".join(
        f"{COLUMNS[key]} {share:.1%}" for key, share in chance(a, b).items() if share is not None
    )
    unit = COLUMNS[main_share(a, b)].split()[0]
    sentences = [
        f"Shares of all groups and all weights; below the kinds, of {unit} that differ. "
        f"Unrelated masks: {said}."
    ]
    if apart := [name for name in a if name in b and a.patterns[name] != b.patterns[name]]:
        where = "" if {*apart} == {*a} & {*b} else f" in {len(apart)} linears"
        sentences.append(
            f"{a.patterns} and {b.patterns} have no groups in common{where}: weights alone are "
            "compared."
        )
    for name, masks, others in (("A", a, b), ("B", b, a)):
        only = [linear for linear in masks if linear not in others]
        if only:
            shown = ", ".join(only[:3] + ["…"] * (len(only) > 3))
            sentences.append(
                f"Only {name} has masks of {len(only)} linears, which are not compared: {shown}."
            )
    return sentences


def main_share(a: MaskSet, b: MaskSet) -> str:
    """The key of the share that a table cell or a picture shows when it has room for only one."""
    is_same = all(a.patterns[name] == b.patterns[name] for name in a if name in b)
    return "groups_differ" if is_same else "weights_differ"


def figures(a: MaskSet, b: MaskSet, differences: Differences) -> dict[str, Any]:
    """The shares of everything, of each layer, kind and linear, as JSON values."""

    def plain(counts: Difference) -> dict[str, Any]:
        return {**counts.shares(), "weights": counts.weights, "groups": counts.groups}

    def sums(grouped: Mapping[str, Differences]) -> dict[str, Any]:
        return {key: plain(total(inside.values())) for key, inside in grouped.items()}

    def source(masks: MaskSet) -> dict[str, str]:
        return {
            "path": str(masks.path),
            "method": masks.method,
            "pattern": str(masks.patterns),
        }

    return {
        "a": source(a),
        "b": source(b),
        "unrelated": chance(a, b),
        "all": plain(total(differences.values())),
        "layers": sums(by_layer(differences)),
        "kinds": sums(by_kind(differences)),
        "linears": {name: plain(counts) for name, counts in differences.items()},
    }


def draw(a: MaskSet, b: MaskSet, differences: Differences, path: Path) -> None:
    """Write a picture of the share that differs, linear kinds x layers.

    Raises:
        ConfigError: no linear lies in a numbered layer.
    """
    # Matplotlib is only imported where a picture is wanted.
    from megamask.report.plot_style import save

    if not places_of(differences):
        raise ConfigError(
            "--picture",
            str(path),
            "linears that lie in numbered layers",
            "Use --json for these masks.",
        )
    names = (f"{a.method} {a.patterns}", f"{b.method} {b.patterns}")
    save(lambda: layer_map(a, b, differences, names), path)


def layer_map(a: MaskSet, b: MaskSet, differences: Differences, names: tuple[str, str]) -> Figure:
    """The picture of the share that differs; some linear lies in a numbered layer.

    Args:
        a, b: the masks.
        differences: their differences.
        names: of the masks, for the title.
    """
    from megamask.report.layer_pictures import difference_picture

    main, places = main_share(a, b), places_of(differences)
    grouped: dict[tuple[str, int], list[Difference]] = {}
    for name, place in places.items():
        grouped.setdefault(place, []).append(differences[name])
    shares = {place: total(some).shares()[main] for place, some in grouped.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in shares))
    layers = max(layer for _, layer in shares) + 1
    cells = [[shares.get((kind, layer)) for layer in range(layers)] for kind in kinds]
    numbers = [[math.nan if share is None else share for share in row] for row in cells]
    return difference_picture(
        kinds, numbers, f"{COLUMNS[main].capitalize()}: {' and '.join(names)}"
    )


def by_layer(differences: Differences) -> dict[str, dict[str, Difference]]:
    """The differences grouped by layer number; ``NOWHERE`` for linears that lie in no layer."""
    places, grouped = places_of(differences), defaultdict[float, dict[str, Difference]](dict)
    for name, counts in differences.items():
        grouped[places[name][1] if name in places else math.inf][name] = counts
    return {
        NOWHERE if layer == math.inf else f"{layer}": grouped[layer] for layer in sorted(grouped)
    }


def by_kind(differences: Differences) -> dict[str, dict[str, Difference]]:
    """The differences grouped by kind of linear."""
    places, grouped = places_of(differences), defaultdict[str, dict[str, Difference]](dict)
    for name, counts in differences.items():
        grouped[_kind(name, places)][name] = counts
    return grouped


def total(parts: Iterable[Difference]) -> Difference:
    """The sum of the counts."""
    return sum(parts, start=Difference())


def _kind(name: str, places: Mapping[str, tuple[str, int]]) -> str:
    return places[name][0] if name in places else name.rpartition(".")[2]


def _title(masks: MaskSet) -> str:
    return f"{masks.path}: {masks.method}, {masks.patterns}, {len(masks)} linears"


def _shares(counts: Difference) -> list[str]:
    return [_percent(share) for share in counts.shares().values()]


def _percent(share: float | None) -> str:
    return NOWHERE if share is None else f"{share:.2%}"
