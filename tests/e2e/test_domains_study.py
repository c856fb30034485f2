"""The study of domains with megamask's real verbs, on the tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask import load_masks
from megamask.errors import EXIT_OK
from megamask.storage import read_json
from tests.e2e.program import RECIPE
from tests.fork_server import ROOT

# The rules of a study are tested in tests/unit/studies.
STARTS = ("scratch", "transfer")
pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def test_each_domain_gets_two_masks(
    prepared: Path, model: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "hf").symlink_to(model)
    (base / "weights").symlink_to(prepared / "weights")
    command = [
        *(sys.executable, "-m", "studies.domains", "--base", str(base), "--out", str(out)),
        *("--recipe", str(RECIPE), "--steps", "2", "prune.methods=[sparsegpt]"),
        *settings(prepared)[1:],
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert done.returncode == EXIT_OK
    masks = {
        name: load_masks(out / name / "masks" / "learned.safetensors")
        for name in ("all", *(f"{one}/{start}" for one in ("prose", "code") for start in STARTS))
    }
    assert len({tuple(mask.index(name).sum() for name in mask) for mask in masks.values()}) == 5
    found = {one["domain"]: one["perplexity"] for one in read_json(out / "domains.json", "")}
    assert list(found) == ["prose", "code"]
    for values in found.values():
        assert list(values) == ["dense", "sparsegpt", "general", "scratch", "transfer"]
        assert len(set(values.values())) == 5 and min(values.values()) > 1
