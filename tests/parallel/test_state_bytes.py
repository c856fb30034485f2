"""Every byte of state a weight: what a learner really holds after a step is what ``state_bytes`` says, part by part."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab import Lab
from benchmarks.memory import KEPT, count, kept_for_backward
from megamask.config import Config
from megamask.config.load import build_config
from megamask.config.presets import FOOTPRINTS
from megamask.data.batches import BatchPlan
from megamask.learn.setup import build_subject
from megamask.learn.step import Learner
from megamask.learn.survey import Survey
from megamask.parallel.mesh import start
from megamask.plan.bytes import state_bytes
from megamask.sparsity.pattern import Pattern
from tests.parallel.ranks import meet_again, run_ranks
from tests.parallel.tiny import Chains, config_of

pytestmark = pytest.mark.slow
ACCUMULATIONS = 2

RUNS: dict[str, Mapping[str, Any]] = {
    "default": FOOTPRINTS["default"],
    "lean": FOOTPRINTS["lean"],
    "leanest": FOOTPRINTS["leanest"],
    "step": {"learn": {"sampling": {"draws": "step"}}},
    "lean-step": {"learn": {**FOOTPRINTS["lean"]["learn"], "sampling": {"draws": "step"}}},
    "lion8bit-fp32": {"learn": {"optimizer": {"kind": "lion8bit"}}},
    "adamw8bit": {"learn": {"state": {"logits": "bf16"}, "optimizer": {"kind": "adamw8bit"}}},
}
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
# bytes a weight in bf16, the masked weight kept for the backward pass and the winners apart
TARGETS = {"default": 26.0, "lean": 15.0, "leanest": 11.0}


def config_for(run_dir: Path, name: str) -> Config:
    return config_of(
        run_dir, learn={"global_batch": 4, "micro_batch": 2, "steps": 4, **RUNS[name].get("learn", {}), "prior": {"mask": None}}
    )


def count_all(rank: int, run_dir: Path, names: list[str]) -> dict[str, dict[str, float]]:
    found = {}
    for name in names:
        config = config_for(run_dir, name)
        with start(config) as mesh:
            subject = build_subject(config, mesh)
            plan = BatchPlan(Chains(), config.learn.global_batch, config.learn.micro_batch, mesh.dp, mesh.dp_rank)
            lab = Lab(config, mesh, subject, Learner(config, mesh, subject), plan)
            survey = Survey(subject, mesh, config.learn.state.movement)
            kept = kept_for_backward(lab)
            survey()
            weights = sum(linear.weight.numel() for linear in subject.linears.values())
            found[name] = {part: size / weights for part, size in {**count(lab, survey), KEPT: kept}.items()}
        meet_again()
    return found


@pytest.fixture(scope="module")
def counted(tiny_run: Path) -> dict[str, dict[str, float]]:
    names = [name for name in RUNS if name != "adamw8bit" or HAS_TORCHAO]
    return run_ranks(count_all, 1, tiny_run, names)[0]


@pytest.mark.parametrize("name", RUNS)
def test_counted_is_allocated(counted: dict[str, dict[str, float]], tiny_run: Path, name: str) -> None:
    if name not in counted:
        pytest.skip("torchao is not installed")
    learn = config_for(tiny_run, name).learn
    expected = state_bytes(Pattern(2, 4), learn.state, learn.optimizer, learn.sampling, ACCUMULATIONS, "fp32")
    for part, size in expected.items():
        # Step counters and code tables do not grow with the weights: 2 KiB at most for each layer of 4,096 weights or more here.
        fixed = 0.51 if name == "adamw8bit" and part == "optimizer moments" else 0.002
        assert size <= counted[name].get(part, 0.0) <= size + fixed, part


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    learn = build_config(dict(RUNS[name])).learn
    parts = state_bytes(Pattern(2, 4), learn.state, learn.optimizer, learn.sampling, ACCUMULATIONS, "bf16")
    total = sum(parts.values()) - parts[KEPT] - parts["winners of the survey"]
    assert total <= TARGETS[name]
    assert total == pytest.approx({"default": 26, "lean": 14, "leanest": 9.53}[name], abs=0.005)
