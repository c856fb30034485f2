"""The verb diff: how two masks differ, by layer and by kind of linear, as tables, JSON and a
picture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megamask.errors import ConfigError
from megamask.masks.compare import Difference, unrelated
from megamask.masks.file import MaskSet
from megamask.report.layers import places_of
from megamask.tables import aligned

NOWHERE = "–"  # layer of a linear that lies in none
ALL = "**all**"
COLUMNS = {
    "groups_differ": "groups differ",
    "weights_differ": "weights differ",
    "kept_by_both": "kept by both",
}


def lines(a: MaskSet, b: MaskSet, found: Mapping[str, Difference]) -> list[str]:
    """The tables, with what unrelated masks would show, and what could not be compared."""
    layers, kinds = by_layer(found), by_kind(found)
    places, main = places_of(found), main_share(a, b)
    rows = []
    for layer, inside in layers.items():
        cells = [
            total(one for name, one in inside.items() if _kind(name, places) == kind)
            for kind in kinds
        ]
        rows.append(
            [
                layer,
                *_shares(total(inside.values())),
                *(_percent(one.shares()[main]) if one.weights else NOWHERE for one in cells),
            ]
        )
    rows.append(
        [
            ALL,
            *_shares(total(found.values())),
            *(_percent(total(one.values()).shares()[main]) for one in kinds.values()),
        ]
    )
    head = [f"A  {_title(a)}", f"B  {_title(b)}", ""]
    table = aligned(["layer", *COLUMNS.values(), *kinds], rows)
    kind_rows = [
        [kind, f"{len(inside):,}", *_shares(total(inside.values()))]
        for kind, inside in kinds.items()
    ]
    kind_rows.append([ALL, f"{len(found):,}", *_shares(total(found.values()))])
    return [
        *head,
        *table,
        "",
        *aligned(["kind", "linears", *COLUMNS.values()], kind_rows),
        "",
        *notes(a, b),
    ]


def notes(a: MaskSet, b: MaskSet) -> list[str]:
    """How to read the shares."""
    chance = {
        COLUMNS[key]: share
        for key, share in unrelated(a.pattern, b.pattern).items()
        if share is not None
    }
    shares = f"Shares of all groups and all weights; below the kinds, of {COLUMNS[main_share(a, b)].split()[0]} that differ."
    found = [
        f"{shares} Unrelated masks: {', '.join(f'{title} {share:.1%}' for title, share in chance.items())}."
    ]
    if a.pattern != b.pattern:
        found.append(
            f"{a.pattern} and {b.pattern} have no groups in common: weights alone are compared."
        )
    for one, other, name in ((a, b, "A"), (b, a, "B")):
        only = [linear for linear in one if linear not in other]
        if only:
            shown = ", ".join(only[:3] + ["…"] * (len(only) > 3))
            found.append(
                f"Only {name} has masks of {len(only)} linears, which are not compared: {shown}."
            )
    return found


def main_share(a: MaskSet, b: MaskSet) -> str:
    """The share that stands for a difference where there is room for one."""
    return "groups_differ" if a.pattern == b.pattern else "weights_differ"


def figures(a: MaskSet, b: MaskSet, found: Mapping[str, Difference]) -> dict[str, Any]:
    """The same as plain values."""

    def plain(one: Difference) -> dict[str, Any]:
        return {**one.shares(), "weights": one.weights, "groups": one.groups}

    return {
        **{
            name: {"path": str(one.path), "method": one.method, "pattern": str(one.pattern)}
            for name, one in (("a", a), ("b", b))
        },
        "unrelated": unrelated(a.pattern, b.pattern),
        "all": plain(total(found.values())),
        "layers": {
            layer: plain(total(inside.values())) for layer, inside in by_layer(found).items()
        },
        "kinds": {kind: plain(total(inside.values())) for kind, inside in by_kind(found).items()},
        "linears": {name: plain(one) for name, one in found.items()},
    }


def draw(a: MaskSet, b: MaskSet, found: Mapping[str, Difference], path: Path) -> None:
    """Write the share that differs as a picture, linear kinds x layers.

    Raises:
        ConfigError: no linear lies in a layer.
    """
    from megamask.report.pictures import (  # matplotlib: only where a picture is wanted
        difference_picture,
        save,
    )

    main, places = main_share(a, b), places_of(found)
    if not places:
        raise ConfigError(
            "--picture",
            str(path),
            "linears that lie in numbered layers",
            "Use --json for these masks.",
        )
    shares = {places[name]: found[name].shares()[main] for name in places}
    kinds = list(dict.fromkeys(kind for kind, _ in shares))
    cells = [
        [shares.get((kind, layer)) for layer in range(max(layer for _, layer in shares) + 1)]
        for kind in kinds
    ]
    numbers = [[math.nan if share is None else share for share in row] for row in cells]
    title = f"{COLUMNS[main].capitalize()}: {a.method} {a.pattern} and {b.method} {b.pattern}"
    save(difference_picture(kinds, numbers, title), path)


def by_layer(found: Mapping[str, Difference]) -> dict[str, dict[str, Difference]]:
    """Layer number, or a dash -> its linears."""
    places, grouped = places_of(found), defaultdict[float, dict[str, Difference]](dict)
    for name, one in found.items():
        grouped[places[name][1] if name in places else math.inf][name] = one
    return {
        NOWHERE if layer == math.inf else f"{layer}": grouped[layer] for layer in sorted(grouped)
    }


def by_kind(found: Mapping[str, Difference]) -> dict[str, dict[str, Difference]]:
    """Kind of linear -> the linears of it."""
    places, grouped = places_of(found), defaultdict[str, dict[str, Difference]](dict)
    for name, one in found.items():
        grouped[_kind(name, places)][name] = one
    return grouped


def total(parts: Iterable[Difference]) -> Difference:
    """The sum of the counts."""
    return sum(parts, start=Difference())


def _kind(name: str, places: Mapping[str, tuple[str, int]]) -> str:
    return places[name][0] if name in places else name.rpartition(".")[2]


def _title(masks: MaskSet) -> str:
    return f"{masks.path}: {masks.method}, {masks.pattern}, {len(masks)} linears"


def _shares(one: Difference) -> list[str]:
    return [_percent(share) for share in one.shares().values()]


def _percent(share: float | None) -> str:
    return NOWHERE if share is None else f"{share:.2%}"
