"""An export in Megatron's format: its files, and the dtype of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.errors import ArtifactError
from megamask.export import megatron_folder
from megamask.export.folded import STAMP
from megamask.masks.file import load_masks, save_masks
from megamask.safe_checkpoint import COMMON
from megamask.sparsity.pattern import Pattern
from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.checkpoint_folder import FORMAT, RELEASE, RUN_CONFIG, TRACKER
from tests.unit.weights.dist_checkpoint.checkpoints import CONFIG, LAYER, write


def test_an_export_is_found_where_its_source_was_a_checkpoint(
    hf: Path, tensors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file of a checkpoint beside config.json becomes one of the export."""
    (hf / TRACKER).write_text("20")
    (hf / RUN_CONFIG).write_text("model:\n  hidden_size: 3\n")
    for name in (FORMAT, COMMON, "__0_0.distcp"):
        (hf / name).write_text("{}")
    out = tmp_path / "out"
    with BaseModel(hf, write(tmp_path / "x", tensors)).open() as source:
        megatron_folder.export(BaseModel(hf), out, source, None)
    assert "--use-checkpoint-args --norm-epsilon 1e-05; " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"config.json", STAMP, TRACKER, RELEASE}
    with BaseModel(out, out).open() as source:
        found = source.tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(found, tensors[LAYER])


def test_an_export_has_the_dtype_of_the_config(
    hf: Path, tensors: dict[str, Any], tmp_path: Path
) -> None:
    """Pruned places are +0.0 after the cast, and what the dtype does not hold is an error."""
    (hf / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float16"}))
    base, out = BaseModel(hf, write(tmp_path / "x", tensors)), tmp_path / "out"
    name, path = "model.layers.1.mlp.down_proj", tmp_path / "mask.safetensors"
    with base.open() as source:
        mask = Pattern(2, 4).best(source.tensor(f"{name}.weight").abs())
        save_masks(path, {name: mask}, Pattern(2, 4), fingerprint="x", method="magnitude")
        megatron_folder.export(base, out, source, load_masks(path))
    with BaseModel(out, out).open() as written:
        found = written.tensor(f"{name}.weight")
        assert all(written.tensor(one).dtype == torch.float16 for one in written.names())
    assert torch.equal(found, tensors[LAYER].half() * mask)
    assert not torch.signbit(found[~mask]).any()
    tensors[LAYER][0, 0] = 1e5
    base = BaseModel(hf, write(tmp_path / "x", tensors))
    with base.open() as source, pytest.raises(ArtifactError, match="too large for float16"):
        megatron_folder.export(base, out, source, None)
    assert (out / TRACKER).read_text() == RELEASE
