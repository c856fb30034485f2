"""What is said of masks whose training text is not the training text of the shards of today."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import Config, run_paths
from megamask.data.heldout import calibration_description
from megamask.data.shards import read_shards
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.prepare.learned_text import warn_of_learned_text
from megamask.verbs import tokenize


def made_from(folder: Path, name: str, data: Any) -> MaskSet:
    masks = {"linear": torch.tensor([[True, True, False, False]])}
    save_masks(
        folder / f"{name}.safetensors", masks, "2:4", fingerprint="f", method=name, data=data
    )
    return load_masks(folder / f"{name}.safetensors")


def test_masks_of_other_text_are_named(
    two_domains: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = two_domains()
    tokenize.run(config)
    text = {
        name: read_shards(run_paths(config).shards / name).content_sha256("train")
        for name in config.data.domains
    }
    masks = {
        "learned": made_from(tmp_path, "learned", {"text_sha256": text}),
        "wanda": made_from(tmp_path, "wanda", {"calibration": calibration_description(config)}),
        # the text of the recovery itself is not noted here: that of its mask decides
        "recovered": made_from(
            tmp_path, "recovered", {"recovered": {"mask_text": {"text_sha256": text}}}
        ),
        "of before": made_from(tmp_path, "old", {"blend": {"a": 1.0}}),
        "foreign": made_from(tmp_path, "foreign", ["text_sha256"]),
    }
    with caplog.at_level(logging.WARNING):
        warn_of_learned_text(config, masks)
        assert not caplog.messages
        # the same text under another share: documents that were learned from are held out now
        values = config.model_dump()
        values["data"]["domains"]["b"]["heldout"] = 0.5
        again = Config.model_validate(values)
        tokenize.run(again)
        warn_of_learned_text(again, masks)
        told = [message.partition(" of b than ")[0] for message in caplog.messages]
        assert told == [
            f"{name} was made from other text" for name in ("learned", "wanda", "recovered")
        ]
