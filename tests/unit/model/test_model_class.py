"""Which class of Megatron a model is made of."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from megamask.errors import ConfigError
from megamask.model.language_model import LanguageModel
from megamask.model.model_class import VARIABLE, model_class

HAS_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None


def hide(monkeypatch: pytest.MonkeyPatch, module: str, ours: str) -> None:
    """Make a module of Megatron unavailable to the module of ours that needs it."""
    monkeypatch.delitem(sys.modules, f"megamask.model.{ours}", raising=False)
    monkeypatch.setitem(sys.modules, f"megatron.core.models.{module}", None)


def test_gpt_model_is_the_first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from megamask.model.gpt_backbone import GptLanguageModel

    monkeypatch.delenv(VARIABLE, raising=False)
    assert model_class() is GptLanguageModel and issubclass(GptLanguageModel, LanguageModel)
    monkeypatch.setenv(VARIABLE, "gpt")
    assert model_class() is GptLanguageModel


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "mamba")
    with pytest.raises(ConfigError, match=f"{VARIABLE} = 'mamba'.*gpt or hybrid"):
        model_class()


def test_a_class_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "gpt", "gpt_backbone")
    monkeypatch.setenv(VARIABLE, "gpt")
    with pytest.raises(ConfigError, match=f"{VARIABLE} = 'gpt'.*this version lacks it"):
        model_class()
    monkeypatch.delenv(VARIABLE)
    if HAS_HYBRID:
        found: Any = model_class()
        assert found.__mro__[2].__name__ == "HybridModel"
    hide(monkeypatch, "hybrid.hybrid_model", "hybrid_backbone")
    monkeypatch.setitem(sys.modules, "megatron.core.models.hybrid", None)
    for asked in ("hybrid", None):
        if asked is not None:
            monkeypatch.setenv(VARIABLE, asked)
        with pytest.raises(ConfigError, match=f"{VARIABLE} = .*this version lacks it"):
            model_class()
        monkeypatch.delenv(VARIABLE, raising=False)


def test_a_fault_in_megatron_is_no_missing_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "megamask.model.gpt_backbone", raising=False)
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.transformer_block", None)
    with pytest.raises(ImportError, match="transformer_block"):
        model_class()
