"""The facts beside the rows of results.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megamask.config.load import load_config
from megamask.config.paths import run_paths
from megamask.evaluate.rows import facts_beside
from megamask.masks.file import load_masks, save_masks
from megamask.sparsity.pattern import Pattern


def test_a_stage_is_not_the_time_of_a_row_of_its_name(tmp_path: Path) -> None:
    """The stage learn has taken 777 s; the mask that a user calls learn has taken 5, or nobody
    knows how many.
    """
    paths = run_paths(load_config(None, [f"run_dir={tmp_path}"]))
    (tmp_path / "stages.json").write_text(json.dumps({"learn": 777.0, "convert": 8.0}))
    masks = {"a": Pattern(2, 4).best(torch.rand(4, 8))}
    text: Any = SimpleNamespace(facts={})
    for seconds in (5.0, None):
        known: dict[str, Any] = {"fingerprint": "f", "method": "x", "seconds": seconds}
        save_masks(tmp_path / "m", masks, "2:4", **known)
        found: Any = {name: load_masks(tmp_path / "m") for name in ("learn", "other")}
        taken = {} if seconds is None else {"learn": 5.0, "other": 5.0}
        facts = facts_beside(paths, found, text, {"a": (4, 8)})
        assert facts["seconds"] == {"convert": 8.0, **taken}
