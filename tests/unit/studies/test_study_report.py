"""The report of the study: rows, ties, curves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from megamask.errors import EXIT_OK
from studies.learners import __main__
from studies.learners.arms import BASE, by_name
from studies.learners.picture import Curve
from studies.learners.report import Row, against
from tests.fork_server import ROOT
from tests.unit.studies.stand_ins import BATCH, SEQ, STEPS, Words


def row_of(scores: list[float], digest: str, seeds: tuple[int, ...] = ()) -> Row:
    return Row(
        "arm",
        "arm",
        [{"code": score, "prose": score} for score in scores],
        [{"digest": digest, "seed": seed} for seed in seeds or range(len(scores))],
        {},
    )


def test_the_report(words: Words, verbs: list[str], tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "learners-findings.md").write_text("## Findings\n\nWritten by hand.\n")
    assert (
        __main__.main(
            words("--arms", BASE, "oneshot-2of4", "tau-2", "scale-4-*", "--seeds", "7", "8")
        )
        == EXIT_OK
    )
    verbs.clear()
    assert (
        __main__.main(words("--report-only", "--report-to", str(docs))) == EXIT_OK and verbs == []
    )
    text = (docs / "learners.md").read_text()
    assert "Written by hand." in text and str(tmp_path) not in text
    assert (docs / "learners.png").stat().st_size < 200_000
    # The stand-ins say code 11 and prose 22 + seed: geometric means over seeds, sqrt(29 * 30) =
    # 29.50, and over domains, sqrt(11 * 29.50).
    row = next(line for line in text.splitlines() if line.startswith("| subset, "))
    assert (
        "11.00 (11.00–11.00)" in row
        and "29.50 (29.00–30.00)" in row
        and f"{math.sqrt(11 * 29.50):.2f} (" in row
    )
    assert "reference" in next(
        line for line in text.splitlines() if line.startswith("| 1 to 0.05 ")
    )
    assert f" {STEPS * BATCH * SEQ} " in row and " 2 |" in row
    assert (
        next(line for line in text.splitlines() if line.startswith("| 2 to 0.05 ")).count(
            "tie (+0.0%)"
        )
        == 1
    )
    # Steps 2, 4 and 6 of 6 have been measured, a hundredth of their number each.
    lines = text.splitlines()
    scaled = next(number for number, line in enumerate(lines) if line.startswith("| 4 x the batch"))
    head = max(n for n, line in enumerate(lines[:scaled]) if line.startswith("| setting"))
    columns, cells = ([cell.strip() for cell in lines[at].split("|")] for at in (head, scaled))
    found = dict(zip(columns, cells, strict=True))
    assert (found["signal"], found["clip factor"]) == ("0.04", "0.5")
    assert "below epsilon" not in found and "move / rate" not in found
    assert f"{STEPS} steps of {BATCH} x {SEQ} tokens ({STEPS * BATCH * SEQ} tokens)" in text
    assert (
        "| SparseGPT mask " in text
        and "Not run: `prior-wanda`, `prior-magnitude`, `prior-none`." in text
    )


@pytest.mark.parametrize(
    ("scores", "reference", "noise", "expected"),
    [
        ([10.3], [10.0], None, "+3.0%"),  # one seed each: nothing is known of the spread
        ([10.3], [10.0], 0.05, "tie (+3.0%)"),  # within the base's spread of 5 %
        ([10.3], [10.0], 0.02, "+3.0%"),
        ([10.2], [9.9, 10.1], None, "+3.0%"),  # the reference's own spread: 2 %
        ([10.0, 10.4], [9.9, 10.1], None, "tie (+2.0%)"),  # 4 % between the arm's seeds
        ([9.5, 9.5], [9.9, 10.1], 0.5, "-5.0%"),  # their own spread counts, not the base's
    ],
)
def test_what_seeds_make_alone_is_a_tie(
    scores: list[float], reference: list[float], noise: float | None, expected: str
) -> None:
    assert against(row_of(scores, "a"), row_of(reference, "b"), noise) == expected


def test_a_difference_is_between_the_seeds_that_both_have() -> None:
    """Of three seeds the first is the best: their mean would hide that an arm is 5 % worse."""
    reference = row_of([10.0, 10.8, 10.7], "b", seeds=(1, 2, 3))
    assert against(row_of([10.5], "a", seeds=(1,)), reference, None) == "tie (+5.0%)"
    assert against(row_of([12.0], "a", seeds=(1,)), reference, None) == "+20.0%"
    assert against(row_of([13.0, 9.6], "a", seeds=(3, 1)), reference, None) == "tie (+8.0%)"
    assert against(row_of([10.5], "a", seeds=(4,)), reference, None) == ""


def test_a_curve_is_of_the_steps_that_all_seeds_evaluated() -> None:
    def seed(**perplexity: float) -> dict[str, Any]:
        points = [
            {"step": int(step[1:]), "tokens": 8 * int(step[1:]), "perplexity": {"code": value}}
            for step, value in perplexity.items()
        ]
        return {"curve": points, "peak_memory_gib": 1.0}

    curve = Curve.of(by_name()[BASE], [seed(s0=9, s30=5, s60=4), seed(s0=4, s60=1)], (0.5, False))
    assert curve.tokens == [0, 480] and curve.seconds == [0, 30]
    assert curve.score == pytest.approx([6, 2])


def test_the_stored_report_has_the_names_of_today() -> None:
    text = (ROOT / "docs" / "results" / "learners.md").read_text()
    named = set(re.findall(r"All else as `([^`]+)`", text))
    assert named and named <= by_name().keys()
    labels = {line.split("|")[1].split(",")[0].strip() for line in text.splitlines() if "|" in line}
    assert {"subset", "categorical"} <= labels and "linear" not in labels
