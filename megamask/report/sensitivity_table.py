"""The table of the sensitivity of layers or linears (MaskLLM, Figure 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megamask.errors import ArtifactError
from megamask.report.own_rows import OwnMasks
from megamask.report.result_table import ResultKind, ResultTable, TablePicture
from megamask.report.results_table import base_method, format_protocol
from megamask.storage import is_number, read_object
from megamask.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIX = "Run the verb sensitivity again."
COMPARED = (
    "compared_targets"  # of the protocol: the verb compares no outputs with the dense model's
)
MEASURED: dict[str, Any] = {  # after every part
    "made_from": {"pattern": (str, dict), "method": str, "parts": list, "protocol": dict},
    "dense": dict,
    "loss": dict,
}
FINISHED = {"ranked": list, "kept_dense": list, "keep_dense": (int, float)}


def sensitivity_table(results: Mapping[str, Any]) -> str:
    """The table as aligned Markdown, the most sensitive part first.

    Args:
        results: the content of ``sensitivity.json``.
    """
    notes = (f"\n{note}" for note in _notes(results))
    kept = ["", *rows_table(results)] if results.get("rows") else []
    return "\n".join([*table(_header(results), list(_cells(results).values())), *kept, *notes])


def rows_table(results: Mapping[str, Any]) -> list[str]:
    """The masked model with the most sensitive parts kept dense, as aligned Markdown (MaskLLM,
    Table 15): perplexity of each domain, the dense model first.
    """

    def cells(title: str, density: float, losses: Mapping[str, float]) -> list[str]:
        values = (f"{math.exp(losses[domain]):,.2f}" for domain in results["dense"])
        return [title, f"{density:.1%}", *values]

    lines = [cells("all (no mask)", 1.0, results["dense"])] + [
        cells(f"{count} most sensitive", row["density"], row["loss"])
        for count, row in results["rows"].items()
    ]
    return table(["parts kept dense", "density", *results["dense"]], lines)


def read_sensitivity(path: Path, own: OwnMasks) -> ResultTable:
    """The table and the picture of a ``sensitivity.json``. The table of a run that has not measured
    all parts yet has the parts in the order of the model. A note tells where the run has another
    mask now.

    Raises:
        ArtifactError: the file holds something else than the verb sensitivity writes.
    """
    results = read_object(path, FIX, MEASURED)
    parts, dense, loss = results["made_from"]["parts"], results["dense"], results["loss"]
    for place, row in {
        "dense": dense,
        **{f"loss.{part}": one for part, one in loss.items()},
    }.items():
        if not isinstance(row, dict) or not row or row.keys() != dense.keys():
            raise ArtifactError(path, f"holds other domains at {place}", FIX)
        for domain, value in row.items():
            if not is_number(value):
                raise ArtifactError(path, f"holds no number at {place}.{domain}", FIX)
    more = {} if results.keys().isdisjoint(FINISHED) else read_object(path, FIX, FINISHED)
    for key in ("ranked", "kept_dense"):
        if not all(isinstance(part, str) and part in loss for part in more.get(key, ())):
            raise ArtifactError(path, f"names parts at {key} that were not measured", FIX)
    increase = _increases(dense, loss)
    found = {**results, "increase": increase}
    notes = [*_said_of_masks(found["made_from"], own), *_notes(found)]
    if not more:
        notes.append(
            f"Not finished: {len(loss)} of {len(parts)} parts. The verb sensitivity goes on."
        )

    def draw() -> Figure:
        # Matplotlib is only imported where a picture is drawn.
        from megamask.report.sensitivity_picture import sensitivity_picture

        return sensitivity_picture(list(loss), increase, more.get("kept_dense", ()))

    picture = TablePicture(
        "sensitivity",
        "Loss increase of each part alone",
        "In the order of the model; parts that the budget keeps dense are orange.",
        draw,
    )
    cells = list(_cells(found).items())
    shown = [picture] if loss else []
    return ResultTable("Sensitivity", _header(found), cells, notes, shown)


SENSITIVITY = ResultKind("sensitivity.json", read_sensitivity, ("sensitivity",))


def _said_of_masks(made: Mapping[str, Any], own: OwnMasks) -> list[str]:
    """A sentence where the run has another mask of the name that was measured."""
    measured = made.get("masks")
    now = [one for name, one in own.masks.items() if base_method(name) == made["method"]]
    if not now or measured is None or measured in {one.content_sha256 for one in now}:
        return []
    about = f"the mask {made['method']} that the run has now"
    return [f"Measured on another mask than {about}. Run the verb sensitivity again."]


def _increases(dense: Mapping[str, float], loss: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        part: {domain: value - dense[domain] for domain, value in row.items()}
        for part, row in loss.items()
    }


def _header(results: Mapping[str, Any]) -> list[str]:
    return ["pruned alone", *results["dense"], "mean", "kept"]


def _cells(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Part -> its row."""
    rows, kept = results["increase"], set(results.get("kept_dense", ()))
    return {
        part: [
            part,
            *(f"{rows[part][domain]:+.4f}" for domain in results["dense"]),
            f"{fmean(rows[part].values()):+.4f}",
            "dense" if part in kept else "",
        ]
        for part in results.get("ranked", rows)
    }


def _notes(results: Mapping[str, Any]) -> list[str]:
    """Units, the choice of the budget where all parts are measured, and the protocol."""
    made, dense = results["made_from"], results["dense"]
    pattern = made["pattern"]
    if isinstance(pattern, dict):
        pattern = " or ".join(dict.fromkeys(map(str, pattern.values())))
    notes = [
        "Increase of the loss in nats a token when this part alone has the "
        f"{pattern} mask of {made['method']}; dense: "
        + ", ".join(f"{domain} {value:.4f}" for domain, value in dense.items())
        + "."
    ]
    if "ranked" in results:
        words = ", ".join(f'"{part}"' for part in results["kept_dense"])
        notes.append(
            f"Kept dense under sensitivity.keep_dense={results['keep_dense']:g}: "
            f"'model.exclude_sensitive=[{words}]'"
        )
    protocol = {key: made["protocol"][key] for key in made["protocol"] if key != COMPARED}
    return [*notes, f"Protocol: {format_protocol(protocol)}"]
