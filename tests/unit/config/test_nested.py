"""Nested mappings are equal, or their differing keys are named."""

from __future__ import annotations

from typing import Any

import pytest

from megamask.config.nested import what_differs


@pytest.mark.parametrize(
    ("now", "keys"),
    [
        ({"a": {"b": 1, "c": {}}, "d": None}, ""),
        ({"a": {"b": 2, "c": {}}, "d": None}, "a.b"),
        ({"a": {"b": 1}, "d": 3, "e": 0}, "a.c, d, e"),
        ({"a": {"b": 1, "c": {}}}, "d"),
        ({"a": 1, "d": None}, "a"),
    ],
)
def test_differing_keys_are_named(now: dict[str, Any], keys: str) -> None:
    before = {"a": {"b": 1, "c": {}}, "d": None}
    assert what_differs(before, now) == what_differs(now, before) == keys
