"""The programs of examples/ that need a model, from end to end on the toy model. They run inside
the test process, as the verbs of the other tests do.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from megamask import load_masks
from tests.fork_server import ROOT

TOY = ["data.seq_length=32", "evaluate.window=32", "evaluate.max_tokens=128", "learn.steps=2"]
TOY += ["data.domains.mine.heldout=0.2", "calibration.seq_length=32", "device=cpu", "dtype=fp32"]
TOY += [
    "calibration.samples=4",
    "learn.global_batch=2",
    "learn.micro_batch=2",
    "evaluate.compare_tokens=0",
]


def example(name: str, *words: str) -> str:
    """What the program prints."""
    printed, logger = io.StringIO(), logging.getLogger("megamask")
    before, level, threads = list(logger.handlers), logger.level, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [name, *words])
        try:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        finally:
            logger.handlers, logger.level = before, level
            torch.set_num_threads(threads)
    return printed.getvalue()


@pytest.mark.slow
def test_learn_your_model(model: Path, corpus: Path, tmp_path: Path) -> None:
    """The whole way, and a second start that has nothing left to learn."""
    said = example("learn_your_model.py", str(model), str(corpus / "prose"), str(tmp_path), *TOY)
    rows = dict(re.findall(r"^perplexity of (\S+): (\S+)$", said, re.M))
    assert list(rows) == ["dense", "magnitude", "sparsegpt", "learned"]
    assert all(float(value) > 1 for value in rows.values())
    assert "kept weights: 50%" in said
    learned = load_masks(tmp_path / "masks/learned.safetensors")
    assert (tmp_path / "export/model.safetensors").exists()
    assert "learned mask" in (tmp_path / "report.html").read_text()
    assert len(learned) == 14


@pytest.mark.slow
def test_one_model_many_masks(general: Path, model: Path) -> None:
    masks = {name: general / f"masks/{name}.safetensors" for name in ("sparsegpt", "learned")}
    words = [f"{name}={file}" for name, file in masks.items()]
    said = example("many_masks.py", str(model), "the mask keeps two of every four", *words)
    losses = dict(re.findall(r"^(\w+): loss (\S+?),? *(?:shown.*)?$", said, re.M))
    assert list(losses) == ["dense", "sparsegpt", "learned"]
    assert len(set(losses.values())) == 3  # each mask shows another model
    assert "dense again: True" in said and "sparsegpt continues:" in said
    share = float(re.findall(r"head included: (\S+)%", said)[0])
    # Half of every linear but the head, which is dense.
    assert 20 < share < 50
