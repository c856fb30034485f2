"""The table of dense and 2:4 products at inference, and the rate of generation with both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.errors import ArtifactError
from megamask.report.own_rows import NO_MASKS, OwnMasks
from megamask.report.result_table import ResultKind, ResultTable, TablePicture
from megamask.runtime.speed_table import FILE, FIX, Passes, Row, read_table
from megamask.storage import is_number, lacks, read_object
from megamask.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ["linear", "tokens", "dense, ms", "2:4, ms", "kernel", "weight, MB", "gain, and why"]
WORKLOAD = ("prompt", "generate", "batch")
LARGEST = 10**18


def speed_markdown(results: ResultTable) -> str:
    """The table as aligned Markdown, with its notes."""
    rows = [list(cells) for _, cells in results.rows]
    return "\n".join([*table(list(results.header), rows), *(f"\n{note}" for note in results.notes)])


def read_speed(path: Path, _: OwnMasks = NO_MASKS) -> ResultTable:
    """The table and the picture of a ``speed.json``: for each shape and number of tokens the
    fastest 2:4 kernel, or what every kernel says against the linear. Times depend on shapes, and
    on no mask of the run.

    Raises:
        ArtifactError: the file holds something else than the verb speed writes.
    """
    found, measured = read_object(path, FIX, {"made_from": {"model": str}}), read_table(path)
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in measured.rows:
        groups.setdefault((*row.shape, row.tokens), []).append(row)
    cells = [_cells(rows, measured.passes) for rows in groups.values()]
    notes = [
        f"Measured on {measured.facts}, in eager PyTorch with the work of the host, weights from "
        "memory. 2:4 gains where the first quartile of dense / 2:4 over the rounds is above 1.",
        *_generation(path, found),
    ]

    def draw() -> Figure:
        # Matplotlib is only imported where a picture is drawn.
        from megamask.report.speed_picture import speed_picture

        return speed_picture(measured.rows)

    picture = TablePicture(
        "speed",
        "Dense time / 2:4 time",
        "By tokens in a forward pass, for each shape; above the black line 2:4 is faster. Bands: "
        "first to third quartile of the rounds.",
        draw,
    )
    shown = [picture] if any(row.speed_up for row in measured.rows) else []
    return ResultTable("Speed", HEADER, [(one[0], one) for one in cells], notes, shown)


SPEED = ResultKind(FILE, read_speed, ("speed",))


def _cells(rows: Sequence[Row], passes: Passes) -> list[str]:
    """The cells of a shape and number of tokens."""
    timed = [row for row in rows if row.speed_up]
    best = max(timed, key=lambda row: row.speed_up[0], default=None)
    first = best or rows[0]
    words = {max(passes): "prefill", min(passes): "decode"} if len(passes) > 1 else {}
    kind = f" ({words[first.tokens]})" if first.tokens in words else ""
    weight = f"{first.dense_bytes / 1e6:,.1f}"
    if best is not None and best.sparse_bytes is not None:
        weight += f" -> {best.sparse_bytes / 1e6:,.1f}"
    verdict = first.verdict()
    if best is None:
        verdict = "no gain: " + "; ".join(dict.fromkeys(f"{row.kernel}: {row.why}" for row in rows))
    return [
        f"{first.out_features} x {first.in_features} {first.dtype}",
        f"{first.tokens:,}{kind}",
        f"{first.dense_ms:,.4g}",
        "–" if first.sparse_ms is None else f"{first.sparse_ms:,.4g}",
        "–" if best is None else best.kernel,
        weight,
        verdict,
    ]


def _generation(path: Path, found: Mapping[str, Any]) -> list[str]:
    """Sentences about the rate of generation."""
    made, generation = found["made_from"], found.get("generation")
    if generation is None:
        return []
    workload = made.get("workload")
    is_workload = isinstance(workload, list) and len(workload) == len(WORKLOAD)
    if not is_workload or not all(_is_rate(one) for one in workload):
        raise ArtifactError(path, "holds no numbers at made_from.workload", FIX)
    if problem := lacks(generation, {"dense": dict}, "generation"):
        raise ArtifactError(path, problem, FIX)
    prompt, generate, batch = workload
    lines = [
        f"Generation by {made['model']} in transformers, with {batch:,} prompts of {prompt:,} "
        f"tokens and {generate:,} tokens of each answer:",
        _rates(path, "dense", generation["dense"]),
    ]
    if "choices" not in generation:
        return [*lines, f"No linear can use a 2:4 kernel: the model {generation.get('why')}."]
    if problem := lacks(generation, {"choices": list}, "generation"):
        raise ArtifactError(path, problem, FIX)
    choices, is_used = _choices(path, generation["choices"])
    if not is_used:  # a rate beside it, of an older version, is the dense model's again
        return [*lines, "No linear gains by a 2:4 kernel, so there is no second rate.", *choices]
    required = {"2:4": dict, "same_token": (int, float)}
    if problem := lacks(generation, required, "generation"):
        raise ArtifactError(path, problem, FIX)
    if not _is_rate(generation["same_token"]):
        raise ArtifactError(path, "holds no share at generation.same_token", FIX)
    return [
        *lines,
        _rates(path, "2:4", generation["2:4"]),
        f"The most likely token is the same at {generation['same_token']:.2%} of a prompt.",
        *choices,
    ]


def _rates(path: Path, way: str, one: Mapping[str, Any]) -> str:
    """The rates of the model with some kernels."""
    required = dict.fromkeys(("prefill_ms", "rate", "weight_bytes", "peak_bytes"), (int, float))
    if problem := lacks(one, required, f"generation.{way}"):
        raise ArtifactError(path, problem, FIX)
    if not all(_is_rate(one[key]) for key in required):
        raise ArtifactError(path, f"holds no rates at generation.{way}", FIX)
    decode = one.get("decode_rate")
    later = f", then {decode:,.1f} tokens/s" if _is_rate(decode) else ""
    return (
        f"{way}: {one['rate']:,.1f} tokens/s in all (first tokens after "
        f"{one['prefill_ms']:,.1f} ms{later}); weights {one['weight_bytes'] / 1e6:,.1f} MB, "
        f"peak {one['peak_bytes'] / 1e6:,.1f} MB."
    )


def _is_rate(value: Any) -> bool:
    return is_number(value) and 0 <= value < LARGEST


def _choices(path: Path, choices: Sequence[Any]) -> tuple[list[str], bool]:
    """What each kind of linear uses, and why; and whether any uses a 2:4 kernel."""
    lines, is_used = [], False
    for one in choices:
        required = {"names": str, "count": int, "kernel": (str, type(None)), "why": str}
        if problem := lacks(one, required, "generation.choices"):
            raise ArtifactError(path, problem, FIX)
        kernel = one["kernel"] or "dense"
        is_used = is_used or bool(one["kernel"])
        lines.append(f"{one['names']} ({one['count']}): {kernel}; {one['why']}.")
    return lines, is_used
