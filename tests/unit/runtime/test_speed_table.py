"""The measured table: what it says of a linear, and what its file may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamask.errors import ArtifactError
from megamask.runtime.device_facts import DeviceFacts
from megamask.runtime.speed_table import SpeedTable, read_table
from megamask.storage import write_json
from tests.fuzz.mutations import json_writer, survives
from tests.unit.runtime.cpu_kernels import FACTS, row

SHAPE = (128, 64)
SLOW = {"sparse_ms": 4.0, "speed_up": (0.45, 0.5, 0.55)}
NOISY = {"sparse_ms": 1.9, "speed_up": (0.9, 1.05, 1.3)}
LACKING = {"sparse_ms": None, "speed_up": (), "sparse_bytes": None, "why": "not on this card"}


@pytest.mark.parametrize(
    ("passes", "rows", "kernel", "why"),
    [
        ({1: 1}, [row(SHAPE, 1)], "cutlass", "cutlass is 2.00 times as fast (at least 1.90)"),
        ({1: 1}, [row(SHAPE, 1, **SLOW)], None, "no gain: dense is 2.00 times as fast (cutlass)"),
        ({1: 1}, [row(SHAPE, 1, **NOISY)], None, "no gain beyond the noise: 0.90 to 1.05 times"),
        ({1: 1}, [row(SHAPE, 1, **LACKING)], None, "not possible: not on this card"),
        ({1: 1}, [], None, "not measured: 128 x 64 bf16 with 1 tokens"),
        ({2: 1}, [row(SHAPE, 1)], None, "not measured: 128 x 64 bf16 with 2 tokens"),
        ({1: 1}, [row(SHAPE, 1, dtype="fp16")], None, "not measured: 128 x 64 bf16"),
        ({1: 1}, [row((64, 128), 1)], None, "not measured: 128 x 64 bf16"),
        # 1 ms is won in a pass of 512 tokens, and 2 are lost in a pass of one token
        ({1: 1, 512: 1}, [row(SHAPE, 1, **SLOW), row(SHAPE, 512)], None, "no gain: dense is 1.25"),
        ({1: 1, 512: 3}, [row(SHAPE, 1, **SLOW), row(SHAPE, 512)], "cutlass", "cutlass is 1.14"),
        # the kernel with the surer gain; a kernel that lacks a number of tokens is left out
        (
            {1: 1},
            [row(SHAPE, 1), row(SHAPE, 1, kernel="cusparselt", speed_up=(1.95, 1.96, 1.97))],
            "cusparselt",
            "cusparselt is 1.96 times as fast (at least 1.95)",
        ),
        (
            {1: 1, 512: 9},
            [
                row(SHAPE, 1, **NOISY),
                row(SHAPE, 512),
                row(SHAPE, 1, kernel="cusparselt"),
                row(SHAPE, 512, kernel="cusparselt", **LACKING),
            ],
            "cutlass",
            "cutlass is 1.83 times",
        ),
    ],
)
def test_what_the_table_says(
    passes: dict[int, int], rows: list[Any], kernel: str | None, why: str
) -> None:
    choice = SpeedTable(FACTS, {1: 1}, rows).choose(SHAPE, "bf16", passes)
    assert (choice.kernel, choice.why[: len(why)]) == (kernel, why)
    assert (choice.speed_up > 1) == (kernel is not None)


def test_the_speed_up_of_a_workload_is_the_ratio_of_its_times() -> None:
    rows = [
        row(SHAPE, 1, dense_ms=3.0, sparse_ms=4.0, speed_up=(0.75, 0.75, 0.75)),
        row(SHAPE, 512, dense_ms=10.0, sparse_ms=5.0, speed_up=(2.0, 2.0, 2.0)),
    ]
    choice = SpeedTable(FACTS, {1: 1}, rows).choose(SHAPE, "bf16", {1: 2, 512: 1})
    assert choice.speed_up == pytest.approx((2 * 3 + 10) / (2 * 4 + 5), rel=1e-12)


def test_rows_say_their_gain() -> None:
    assert row(SHAPE, 1).verdict() == "gain: 2.00 times as fast"
    assert row(SHAPE, 1, **SLOW).verdict() == "no gain: dense is 2.00 times as fast"
    assert (
        row(SHAPE, 1, **NOISY).verdict() == "no gain beyond the noise: 0.90 to 1.30 times as fast"
    )
    assert row(SHAPE, 1, **LACKING).verdict() == "no gain: not on this card"


def table() -> SpeedTable:
    return SpeedTable(FACTS, {512: 1, 1: 128}, [row(SHAPE, 1), row(SHAPE, 512, **LACKING)])


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    write_json(tmp_path / "speed.json", table().as_json())
    assert read_table(tmp_path / "speed.json") == table()


@pytest.mark.parametrize("part", ["device", "capability", "torch"])
def test_a_table_of_another_device_or_pytorch_is_refused_by_name(part: str) -> None:
    other = DeviceFacts(**{**FACTS.as_json(), part: "9.9"})
    table().require(FACTS, "speed.json")
    with pytest.raises(ArtifactError) as found:
        table().require(other, "speed.json")
    assert str(found.value) == (
        f"speed.json: was measured on {FACTS}, and this is {other}. "
        "Run the verb speed again on this machine."
    )


def test_a_file_that_was_changed_by_hand_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"

    def read() -> None:
        found = read_table(path)
        for passes in ({1: 1}, {1: 3, 512: 1}, found.passes):
            assert found.choose(SHAPE, "bf16", passes).why
        assert all(one.verdict() for one in found.rows)

    survives(read, json_writer(path, table().as_json()), count=200)


def test_what_is_wrong_with_a_row_is_said(tmp_path: Path) -> None:
    path, good = tmp_path / "speed.json", table().as_json()
    for changes, said in (
        ({"kernel": "magic"}, "names another dtype or kernel"),
        ({"tokens": 0}, "has a shape or size that is no number"),
        ({"speed_up": [2.0, 1.0, 3.0]}, "has no 2:4 time"),
        ({"dense_ms": 0}, "has no dense time"),
        ({"sparse_ms": None}, "has no 2:4 time, and does not say why"),
        ({"extra": 1}, "is no row"),
    ):
        path.write_text(json.dumps({**good, "rows": [{**good["rows"][0], **changes}]}))
        with pytest.raises(ArtifactError, match=rf"rows\[0\] {said}"):
            read_table(path)
