"""A small model: its config.json, and its tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.megatron_names import fused_name
from megamask.weights.mapping import rules
from tests.unit.weights.dist_checkpoint.checkpoints import CONFIG


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def tensors(hf: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with numbered layers."""
    generator = torch.Generator().manual_seed(0)
    return {
        fused_name(rule.megatron): torch.randn(rule.shape(), generator=generator)
        for rule in rules(BaseModel(hf).architecture(), 12)
    }
