"""The device of what a pass keeps of every linear: the card must not hold the whole model twice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megamask.config import load_config
from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.layerwise import PruningJob, prune_layerwise
from megamask.oneshot.stats import GradientStats, Statistics
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import read_architecture
from megamask.weights.mapping import linear_shapes

TINY = Path(__file__).parents[3] / "configs" / "models" / "tiny-llama.json"
NAME, PATTERN = "decoder.layers.0.mlp.linear_fc2", Pattern(2, 4)


class Recorder(Criterion):
    """Magnitude with updated weights; ``seen`` are the gradients that it was given."""

    updates_weight = True

    def __init__(self, needs_gradients: bool) -> None:
        self.needs_gradients = needs_gradients
        self.seen: GradientStats | None = None
        self.updated_OI = torch.zeros(0)

    def prune(
        self, weight_OI: torch.Tensor, stats: Statistics, pattern: Pattern, settings: PruneSection
    ) -> Pruned:
        self.seen, score_OI = stats.gradients, weight_OI.abs()
        self.updated_OI = weight_OI * 2
        return Pruned(pattern.best(score_OI), score_OI, self.updated_OI)


def job(tmp_path: Path, inputs: str) -> PruningJob:
    (tmp_path / "config.json").write_text(TINY.read_text())
    linear = SimpleNamespace(weight=torch.randn(4, 8), shard_axis=1)
    mesh = SimpleNamespace(device=torch.device("meta"), tp=1, is_main=True)
    config = load_config(None, [f"run_dir={tmp_path}", f"prune.inputs={inputs}"])
    arch, model = read_architecture(tmp_path), cast(Any, None)
    plan = PatternPlan.uniform([*linear_shapes(arch)], PATTERN)
    return PruningJob(config, cast(Any, mesh), arch, plan, model, {NAME: cast(Any, linear)})


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_updated_weights_that_no_layer_computes_with_leave_the_device(
    inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, cpu = [], torch.Tensor.cpu

    def recorded(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", recorded)
    criterion = Recorder(needs_gradients=False)
    prune_layerwise(job(tmp_path, inputs), {"recorder": criterion}, None)
    assert any(one is criterion.updated_OI for one in moved) == (inputs == "dense")


@pytest.mark.parametrize("needed", [True, False])
def test_gradients_come_to_the_device_where_they_are_needed(needed: bool, tmp_path: Path) -> None:
    gradients, criterion = {NAME: GradientStats(torch.ones(4, 8), 3)}, Recorder(needed)
    prune_layerwise(job(tmp_path, "pruned"), {"recorder": criterion}, None, gradients)
    if needed:
        assert criterion.seen is not None and criterion.seen.samples == 3
        assert criterion.seen.sum_square_OI.device.type == "meta"
    else:
        assert criterion.seen is None
    assert gradients[NAME].sum_square_OI.device.type == "cpu"
