"""The heartbeat reads back as it was written; anything else reads as none."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megamask.learn.heartbeat import NAME, Heartbeat
from megamask.process.holder import Holder, utc_now

ONE = Heartbeat("learning", 3, 10, utc_now(), Holder.this_process("megamask learn"), 2)


def test_it_reads_back(tmp_path: Path) -> None:
    assert Heartbeat.read(tmp_path) is None
    ONE.write(tmp_path)
    replace(ONE, step=4).write(tmp_path)
    assert Heartbeat.read(tmp_path) == replace(ONE, step=4)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_place_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    ONE.write(tmp_path / "absent")
    (tmp_path / NAME / "folder").mkdir(parents=True)  # nothing can be renamed to it
    ONE.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert Heartbeat.read(tmp_path) is None


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        "[]",
        "null",
        "\ud800",
        {"step": "3"},
        {"step": True},
        {"holder": None},
        {"holder": {"pid": 1}},
        {"state": "dancing"},
        {"time": 3},
    ],
)
def test_rubbish_is_none(tmp_path: Path, wrong: object) -> None:
    value = wrong if isinstance(wrong, str) else json.dumps({**asdict(ONE), **dict(wrong)})  # type: ignore[call-overload]
    (tmp_path / NAME).write_text(value, errors="replace")
    assert Heartbeat.read(tmp_path) is None
