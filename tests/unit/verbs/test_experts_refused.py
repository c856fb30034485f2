"""What is not built for mixtures of experts is refused by name, before any weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.config import load_config
from megamask.errors import ConfigError
from megamask.verbs import export, reorder
from megamask.verbs.own_arguments import ReorderArguments
from megamask.weights.base_model import BaseModel
from tests.unit.weights.published import COMMON, MIXTRAL


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **MIXTRAL}))
    return tmp_path


def test_reorder(hf: Path) -> None:
    config = load_config(None, [f"model.hf={hf}", f"run_dir={hf / 'run'}"])
    with pytest.raises(ConfigError, match=r"model\.hf.*without experts \(mixtral"):
        reorder.run(config, ReorderArguments(out=str(hf / "out")))


def test_export_to_megatron(hf: Path) -> None:
    settings = [f"model.hf={hf}", f"run_dir={hf / 'run'}", "export.format=megatron"]
    with pytest.raises(ConfigError, match=r"export\.format.*mixture of experts.*export\.format=hf"):
        export.run(load_config(None, settings))


def test_weights_of_megatron(hf: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.megatron.*mixture of experts"):
        BaseModel(hf, hf / "checkpoint").open()
