"""MaskPro as a user meets it: learned, interrupted, resumed, on two replicas, reported, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask import load_masks
from tests.e2e.program import here, in_process, in_ranks, refusal

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]
RUN = (
    "learn.method=maskpro",
    "learn.prior.mask=magnitude",
    "learn.steps=8",
    "learn.snapshot.every=4",
    "learn.micro_batch=2",
    "learn.global_batch=4",
    "data.seq_length=16",
    "learn.maskpro.masks=2",
    "learn.maskpro.baseline=leave_one_out",
    "learn.maskpro.initial_logit=5",
    "learn.maskpro.lr=1000",
    "learn.maskpro.samples=6",
)


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "learn" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("maskpro") / "run"))
    here("learn", *settings(run_dir), *RUN)
    return run_dir


def test_a_run_leaves_what_other_learners_leave(whole: Path, settings: Settings) -> None:
    learned, prior = (
        load_masks(whole / "masks" / f"{name}.safetensors") for name in ("learned", "magnitude")
    )
    assert (
        learned.meta["data"]["method"] == "maskpro" and learned.meta["data"]["prior"] == "magnitude"
    )
    assert any(not torch.equal(learned[name], prior[name]) for name in learned)
    records = train_records(whole)
    assert len(records) == 8
    assert all(
        {"lm_loss", "residual", "advantage", "max_prob", "flip_rate", "prior_difference"}
        <= record.keys()
        for record in records
    )
    assert records[-1]["prior_difference"] > 0
    for verb in ("evaluate", "report", "inspect"):
        here(verb, *settings(whole), *RUN)
    assert (whole / "report.html").exists()


def test_a_resumed_run_and_two_replicas_learn_the_same_mask(
    whole: Path, prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    shutil.rmtree(resumed / "learn" / "snapshots" / "step-00000008")
    (resumed / "masks" / "learned.safetensors").unlink()
    finished = here(
        "learn", *settings(resumed), *RUN, "learn.optimizer.lr=1"
    )  # which does not count here
    assert (
        "without effect here (learn.method=maskpro" in finished.stderr
        and "learn.optimizer.lr" in finished.stderr
    )
    replicas = Path(shutil.copytree(prepared, tmp_path / "replicas"))
    in_ranks(2, ["learn", *settings(replicas), *RUN])
    expected = load_masks(whole / "masks" / "learned.safetensors")
    for run_dir in (resumed, replicas):
        found = load_masks(run_dir / "masks" / "learned.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [record["lm_loss"] for record in train_records(resumed)] == [
        record["lm_loss"] for record in train_records(whole)
    ]


@pytest.mark.parametrize("override", ["learn.maskpro.masks=3", "learn.memory=lean"])
def test_refused_before_anything_is_loaded(
    run_dir: Path, settings: Settings, override: str
) -> None:
    finished = in_process("learn", *settings(run_dir), *RUN, override)
    assert refusal(finished)
    assert not (run_dir / "learn").exists()
