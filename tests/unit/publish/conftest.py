"""A Hub on this machine, and a run with a mask that can be pushed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from megamask.__main__ import main
from megamask.config.published import SETTINGS_SHA256, settings_digest
from megamask.evaluate.rows import mask_digests
from megamask.masks.file import load_masks, save_masks
from megamask.sparsity.pattern import Pattern
from megamask.weights.base_model import BaseModel
from megamask.weights.mapping import linear_shapes
from tests.unit.export.test_masked_folder import save_model
from tests.unit.publish.fake_hub import FakeHub, running_hub

P24 = Pattern(2, 4)
CARD = "---\nlicense: apache-2.0\ntags: [x]\n---\n# The base model\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # The library talks to Xet's own servers where it can; this server is of the older protocol.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a base model, its learned mask, results and a learning run's notes."""
    run = tmp_path / "run"
    (run / "hf").mkdir(parents=True)
    save_model(run / "hf")
    (run / "hf" / "LICENSE").write_text("Apache")
    (run / "hf" / "NOTICE").write_text("by its makers")
    (run / "hf" / "README.md").write_text(CARD)
    (run / "learn").mkdir()
    settings = {
        "run_dir": "/home/me/secret/run",
        "seed": 1234,
        "calibration": {"seed": 77},
        "launch": {"account": "secret-project"},
        "learn": {"method": "subset", "steps": 3, "global_batch": 2},
        "data": {"seq_length": 16, "domains": {"web": {"path": "/home/me/secret/web.txt"}}},
    }
    write_mask(run, {"method": "subset", SETTINGS_SHA256: settings_digest(settings)})
    (run / "learn" / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "learn" / "versions.json").write_text('{"torch": "2.13.0", "platform": "secret-host"}')
    write_results(run / "results.json")
    return run


def write_mask(run: Path, data: dict[str, Any], base: BaseModel | None = None, **more: Any) -> None:
    base = base or BaseModel(run / "hf")
    with base.open() as weights:
        masks = {
            name: P24.best(weights.tensor(f"{name}.weight").abs())
            for name in linear_shapes(base.architecture())
        }
    save_masks(
        run / "masks" / "learned.safetensors",
        masks,
        P24,
        fingerprint=base.fingerprints().exact,
        method="learned",
        data=data,
        **more,
    )


def write_results(path: Path, **more: Any) -> None:
    mask = load_masks(path.parent / "masks" / "learned.safetensors")
    rows = {"dense": 7.0, "wanda": 99.0, "learned": 9.25}
    content = {
        "perplexity": {row: {"code": value} for row, value in rows.items()},
        "kl": {"wanda": {"code": 9.0}, "learned": {"code": 0.5}},
        "protocol": {"name": "heldout", "window": 512, "text": "/home/me/secret/text.txt"},
        "seconds": {"learn": 5.0},
        "density": {"dense": 1.0, "wanda": 0.5, "learned": 0.5},
        "mask_bytes": {"learned": mask.size},
        "masks": mask_digests({"learned": mask}),
    }
    path.write_text(json.dumps(content | more))


def push(run: Path, *words: str) -> int:
    return main(["push", "owner/name", f"run_dir={run}", *words])
