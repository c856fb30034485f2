"""The verb gguf without its package."""

from __future__ import annotations

import sys

import pytest

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.verbs import gguf


def test_without_the_package_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "megamask.weights.from_gguf", raising=False)
    with pytest.raises(ConfigError, match=r"needs the package gguf.*\.\[gguf\]"):
        gguf.run(Config.model_validate({"model": {"gguf": "some.gguf"}}))
