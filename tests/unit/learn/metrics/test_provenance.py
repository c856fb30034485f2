import json
import platform
from pathlib import Path

import pytest
import torch

from megamask.config import load_config
from megamask.learn.metrics.provenance import versions, write_provenance


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["learn.preset=maskllm", "learn.steps=7"],
        [
            "pattern=4:8",
            "run_dir='1e-3'",
            "learn.monitor.sinks=[tensorboard]",
            "learn.optimizer.lr=1e-5",
            "data.domains.null={kind: text, path: 'a: b'}",
        ],
    ],
)
def test_the_settings_read_back(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(None, overrides)
    write_provenance(tmp_path, config, [])
    assert load_config(tmp_path / "config.yaml") == config


def test_versions_are_all_text_and_true(tmp_path: Path) -> None:
    write_provenance(tmp_path, load_config(), [])
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found == versions() and all(isinstance(value, str) and value for value in found.values())
    assert found["python"] == platform.python_version() and found["torch"] == torch.__version__
    assert {
        "megatron-core",
        "transformer-engine",
        "apex",
        "numba",
        "transformers",
        "megamask",
        "platform",
        "cpu",
        "gpu",
        "git commit",
    } <= set(found)
