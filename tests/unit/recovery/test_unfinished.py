"""Unfinished work: of what it is kept, and what is said where it is dropped."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megamask.config.load import build_config
from megamask.parallel.mesh import start
from megamask.recovery.unfinished import Unfinished


def test_the_newest_whole_snapshot_is_loaded_and_dropped_work_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "work"
    with start(build_config({"device": "cpu"})) as mesh, caplog.at_level(logging.INFO):
        kept = Unfinished(folder, {"rate": 1.0}, mesh)
        assert kept.load_newest("training") is None and not caplog.messages
        for step in (9, 10):
            kept.save_step("training", step, {"a": torch.tensor([step])}, [step])
        assert [path.name for path in folder.glob("training-*")] == [
            "training-00000010-0.safetensors"
        ]
        (folder / "training-00000011-0.safetensors").write_bytes(b"torn")
        for made_from in ({"rate": 1.0}, {"rate": 2.0}):
            found = Unfinished(folder, made_from, mesh).load_newest("training")
            if made_from == {"rate": 1.0}:
                assert found is not None and found[1] == [10] and found[0]["a"].tolist() == [10]
                assert not any("starts anew" in said for said in caplog.messages)
        assert found is None
        (said,) = (one for one in caplog.messages if "starts anew" in one)
        assert "of other made_from.rate:" in said
