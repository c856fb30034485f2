"""Every byte of state a weight: what a learner really holds after a step is what ``state_bytes``
says, part by part.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lab import Lab
from benchmarks.memory import KEPT, count, kept_for_backward
from megamask.config import Config
from megamask.config.load import build_config
from megamask.config.presets import MEMORIES
from megamask.data.batches import BatchPlan
from megamask.learn.gumbel import GradientLearner
from megamask.learn.masked_model import build_masked_model
from megamask.learn.method import HARD_CODES, StateOf
from megamask.learn.methods import state_bytes
from megamask.learn.metrics.mask_stats import MaskStatistics
from megamask.parallel.mesh import Mesh, start
from megamask.plan.workload import Workload
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Chains, config_of

pytestmark = pytest.mark.slow
ACCUMULATIONS = 2

RUNS: dict[str, Mapping[str, Any]] = {
    "default": MEMORIES["default"],
    "lean": MEMORIES["lean"],
    "leanest": MEMORIES["leanest"],
    "step": {"learn": {"sampling": {"draws": "step"}}},
    "lean-step": {  # bf16 gradients at the masked weights would be gone between steps
        "learn": {
            "state": {**MEMORIES["lean"]["learn"]["state"], "grads": "fp32"},
            "sampling": {"draws": "step"},
        }
    },
    "lion": {"learn": {"state": {"logits": "bf16"}, "optimizer": {"kind": "lion"}}},
    "lion8bit-fp32": {"learn": {"optimizer": {"kind": "lion8bit"}}},
    "subset": {"learn": {"method": "subset"}},
    "subset-leanest": {"learn": {"method": "subset", **MEMORIES["leanest"]["learn"]}},
    "adamw8bit": {"learn": {"state": {"logits": "bf16"}, "optimizer": {"kind": "adamw8bit"}}},
}
DISTRIBUTED: dict[str, Mapping[str, Any]] = {  # on two replicas
    kind: {"learn": {"global_batch": 8, "optimizer": {"kind": kind, "distributed": True}}}
    for kind in ("adamw", "lion8bit")
}
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
# bytes a weight in bf16, the masked weight kept for the backward pass and the winners apart
TARGETS = {"default": 26.0, "lean": 15.0, "leanest": 11.0}


def config_for(run_dir: Path, run: Mapping[str, Any]) -> Config:
    return config_of(
        run_dir,
        learn={
            "global_batch": 4,
            "micro_batch": 2,
            "steps": 4,
            **run.get("learn", {}),
            "prior": {"mask": None},
        },
    )


def count_all(
    rank: int, run_dir: Path, runs: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    configs = {name: config_for(run_dir, run) for name, run in runs.items()}
    with start(next(iter(configs.values()))) as mesh:
        return {name: count_one(config, mesh) for name, config in configs.items()}


def count_one(config: Config, mesh: Mesh) -> dict[str, float]:
    masked_model = build_masked_model(LearnInputs(config), mesh)
    plan = BatchPlan(
        Chains(), config.learn.global_batch, config.learn.micro_batch, mesh.dp, mesh.dp_rank
    )
    learner = GradientLearner(config, mesh, masked_model)
    lab = Lab(config, mesh, masked_model, learner, plan)
    mask_statistics = MaskStatistics(masked_model, mesh, config.learn.state.track_flips)
    # The update of torchao asks to be compiled, for half a minute. Its state is the same.
    with torch.compiler.set_stance("force_eager"):
        kept = kept_for_backward(lab)
        mask_statistics(learner.step(1, plan).first_draw)
    weights = sum(linear.weight.numel() for linear in masked_model.linears.values())
    counts = {**count(lab, mask_statistics), KEPT: kept}
    return {part: size / weights for part, size in counts.items()}


@pytest.fixture(scope="module")
def counted(tiny_run: Path) -> dict[str, dict[str, float]]:
    runs = {name: run for name, run in RUNS.items() if name != "adamw8bit" or HAS_TORCHAO}
    return run_ranks(count_all, 1, tiny_run, runs)[0]


@pytest.mark.parametrize("name", RUNS)
def test_counted_is_allocated(
    counted: dict[str, dict[str, float]], tiny_run: Path, name: str
) -> None:
    if name not in counted:
        pytest.skip("torchao is not installed")
    learn = config_for(tiny_run, RUNS[name]).learn
    expected = state_bytes(StateOf(Pattern(2, 4), learn, ACCUMULATIONS, "fp32"))
    for part, size in expected.items():
        # Step counters and code tables do not grow with the weights: 2 KiB at most for each layer
        # of 4,096 weights or more here.
        fixed = 0.51 if name == "adamw8bit" and part == "optimizer moments" else 0.002
        assert size <= counted[name].get(part, 0.0) <= size + fixed, part


def test_a_distributed_optimizer_divides_its_moments(tiny_run: Path) -> None:
    """By halves, nearly. The rest is on both replicas."""
    by_rank = run_ranks(count_all, 2, tiny_run, DISTRIBUTED)
    for name, run in DISTRIBUTED.items():
        work = Workload(config_for(tiny_run, run), read_architecture(tiny_run / "hf"), dp=2).check()
        assert work.updated_share == pytest.approx(0.5, abs=0.05)
        for part, size in work.state.items():
            assert (
                size <= max(counted[name].get(part, 0.0) for counted in by_rank) <= size + 0.002
            ), part


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    categorical = {"method": "categorical", **RUNS[name].get("learn", {})}
    learn = build_config({"learn": categorical}).learn
    parts = state_bytes(StateOf(Pattern(2, 4), learn, ACCUMULATIONS))
    total = sum(parts.values()) - parts[KEPT] - parts[HARD_CODES]
    assert total <= TARGETS[name]
    assert total == pytest.approx({"default": 26, "lean": 14, "leanest": 9.53}[name], abs=0.005)
