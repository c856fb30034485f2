"""Recipes and snapshots of version 0.1.0 still do what they did.

The snapshots in ``golden/old-snapshot-*`` were taken after step 2 of 4 by the code of commit
d3ce1bf, of one linear; beside each lies the mask with which that run ended.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask import load_masks
from megamask.config import load_config
from megamask.config.changed import CHANGES
from tests.e2e.golden.runs import ALLOWED, FOLDER, same_machine, share_that_differs
from tests.e2e.program import RECIPE, in_process

Settings = Callable[[Path], list[str]]
ONE_LINEAR = (
    "model.include=['*.0.mlp.down_proj']",
    "learn.prior.mask=magnitude",
    "learn.prior.margins=false",
)
METHODS: dict[str, tuple[str, ...]] = {
    "subset": ("learn.method=subset", "learn.memory=lean"),
    "categorical": ("learn.method=categorical", "learn.sampling.initial_noise=true"),
    "maskpro": (
        "learn.method=maskpro",
        "learn.maskpro.masks=2",
        "learn.maskpro.samples=16",
        "learn.maskpro.initial_logit=1.0",
        "learn.maskpro.lr=500",
    ),
}
# The old words of golden/old-recipe.yaml, and the settings that stand for them now.
RENAMED = {
    "learn.learner": "learn.method",
    "learn.distribution": "learn.method",
    "learn.footprint": "learn.memory",
    "learn.state.movement": "learn.state.track_flips",
    "learn.loss.kind": "learn.distillation.share",
    "learn.loss.share": "learn.distillation.share",
    "learn.loss.temperature": "learn.distillation.temperature",
    "learn.loss.top_k": "learn.distillation.top_k",
    "learn.weight_norm.coef": "learn.weight_norm",
    "learn.weight_norm.decay": "learn.weight_norm",
    "learn.optimizer.eps": "learn.optimizer.epsilon",
    "learn.optimizer.eps_rms": "learn.optimizer.epsilon",
    "learn.monitor.tensorboard": "learn.monitor.sinks",
    "learn.monitor.wandb": "learn.monitor.sinks",
    "data.append_eod": "data.eod",
    "learn.maskpro.baseline=winner": "learn.maskpro.baseline=hard_mask",
}
IN_TODAYS_WORDS = (
    "learn.method=categorical",
    "learn.memory=lean",
    "learn.state.track_flips=false",
    "learn.distillation={share: 0.25, temperature: 2, top_k: 8}",
    "learn.weight_norm=[1e-4, 1e-4]",
    "learn.optimizer.epsilon=[1e-6, 0.2]",
    "learn.optimizer.betas=null",  # the recipe gives none
    "learn.monitor.sinks=[]",
    "learn.maskpro.baseline=hard_mask",
    "data.eod=null",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_old_snapshot_ends_with_the_same_mask(
    name: str, run_dir: Path, model: Path, settings: Settings
) -> None:
    old, snapshots = FOLDER / f"old-snapshot-{name}", run_dir / "learn" / "snapshots"
    shutil.copytree(old / "step-00000002", snapshots / "step-00000002")
    note = snapshots / "step-00000002" / "megamask.json"
    content = json.loads(note.read_text())
    content["settings"]["model"]["hf"] = str(model)  # the run and its model were moved
    if not same_machine():  # random weights may round otherwise, and the fingerprint is of the bits
        content["fingerprint"] = load_masks(run_dir / "masks" / "magnitude.safetensors").fingerprint
    note.write_text(json.dumps(content))

    words = [*settings(run_dir), *ONE_LINEAR, *METHODS[name]]
    finished = in_process("learn", *words, "learn.steps=4", "learn.snapshot.every=2")

    assert finished.code == 0, finished.stderr
    lines = (run_dir / "learn" / "metrics.jsonl").read_text().splitlines()
    trained = [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert trained == [3, 4], "it began at the snapshot, not at the first step"
    found = load_masks(run_dir / "masks" / "learned.safetensors")
    expected = load_masks(old / "learned.safetensors")
    assert share_that_differs(found, expected) <= (0.0 if same_machine() else ALLOWED)
    # a setting that the old note lacks is read as what was done then, not as today's default
    assert CHANGES not in found.meta["data"]
    prior = load_masks(run_dir / "masks" / "magnitude.safetensors")
    (linear,) = expected
    assert not expected.index(linear).equal(prior.index(linear)), "the run learned something"


def test_an_old_recipe_means_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        old = load_config(FOLDER / "old-recipe.yaml")
    said = [record.getMessage() for record in caplog.records]
    assert old == load_config(RECIPE, IN_TODAYS_WORDS)
    assert sorted(said) == sorted(f"{before} is {now} now" for before, now in RENAMED.items())
