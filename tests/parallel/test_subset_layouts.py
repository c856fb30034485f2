"""One logit per weight at 8:16: the same bits of draws and starts at every TP, the same learning,
winners that become the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.learn.gumbel import GradientLearner, GradientResult
from megamask.learn.masked_model import build_masked_model
from megamask.learn.metrics.mask_stats import MaskStatistics, MaskStats
from megamask.parallel.mask_context import RunningSample
from megamask.parallel.mesh import start
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset.subset import SUBSET
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Chains, config_of, gather_hf, gather_logits, gather_masks

pytestmark = pytest.mark.slow
STEPS = 6
DRAWS = {
    "soft": Sample(NoiseKey(1234, 7, 3), 100.0, 4.0),
    "hard": Sample(NoiseKey(1234, 7, 3), 300.0, 1.0, hard=True),
}
Tensors = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """What one layout made, whole, by HF module name."""

    bits: dict[str, Tensors]
    results: list[GradientResult]
    movements: list[MaskStats]
    logits: Tensors
    masks: Tensors


def settings(run_dir: Path, tp: int, backend: str = "auto") -> Config:
    optimizer = {
        "lr": 2e-3,
        "warmup_steps": 1,
        "epsilon": (1e-8, 0.1),
    }  # the whole model's logits decide epsilon
    learn = {
        "method": "subset",
        "steps": STEPS,
        "optimizer": optimizer,
        "prior": {"mask": None},
        "sampling": {"backend": backend},
    }
    return config_of(run_dir, tp, learn).model_copy(update={"pattern": "8:16"})


def learn(rank: int, config: Config) -> Outcome:
    with start(config) as mesh:
        masked_model = build_masked_model(LearnInputs(config), mesh)
        bits = {"initial": gather_logits(masked_model, mesh)}
        for backend in ("torch", "numba"):
            for name, drawn in DRAWS.items():
                masks: dict[str, torch.Tensor] = {}
                gradients: dict[str, torch.Tensor] = {}
                for key, linear in masked_model.linears.items():
                    linear.sampler = sampler_for(backend, SUBSET)
                    masked_model.switch.running = RunningSample(drawn, norm_coef=1e-3)
                    masks[key] = linear.masked_weight(torch.ones_like(linear.weight)).detach()
                    linear.masked_weight(linear.weight).backward(linear.weight + 1)
                    logits = linear.mask_logits
                    assert logits is not None and logits.grad is not None
                    gradients[key], logits.grad = logits.grad, None
                bits[f"{backend} {name} masks"] = gather_hf(masks, masked_model, mesh)
                bits[f"{backend} {name} gradients"] = gather_hf(gradients, masked_model, mesh)
        masked_model.switch.running = None
        learner, mask_statistics = (
            GradientLearner(config, mesh, masked_model),
            MaskStatistics(masked_model, mesh),
        )
        plan = BatchPlan(
            Chains(), config.learn.global_batch, config.learn.micro_batch, mesh.dp, mesh.dp_rank
        )
        results, movements = [], []
        for step in range(STEPS):
            results.append(learner.step(step, plan))
            movements.append(mask_statistics(results[-1].first_draw))
        masks = gather_masks(
            {name: linear.hard_mask() for name, linear in masked_model.linears.items()},
            masked_model.arch,
            mesh,
        )
        return Outcome(bits, results, movements, gather_logits(masked_model, mesh), masks)


@pytest.fixture(scope="module")
def outcomes(tiny_run: Path) -> dict[int, Outcome]:
    return {tp: run_ranks(learn, tp, settings(tiny_run, tp))[0] for tp in (1, 2, 4)}


@pytest.mark.parametrize("tp", [2, 4])
def test_starts_draws_and_gradients_have_the_same_bits(
    outcomes: dict[int, Outcome], tp: int
) -> None:
    for what, expected in outcomes[1].bits.items():
        found = outcomes[tp].bits[what]
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], (
            what
        )
    assert all(logits.shape[1] == 16 for logits in outcomes[tp].logits.values())


@pytest.mark.parametrize("tp", [2, 4])
def test_learning_is_the_same(outcomes: dict[int, Outcome], tp: int) -> None:
    """Layouts sum in fp32 in different orders; test_learning_layouts.py says where these tolerances
    come from.
    """
    found, one = outcomes[tp], outcomes[1]
    for a, b in zip(found.results, one.results, strict=True):
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=1e-6) and a.weight_norm == pytest.approx(
            b.weight_norm, rel=1e-6
        )
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2e-5)
    for name, logits in one.logits.items():
        assert float((found.logits[name] - logits).abs().max()) < 1e-4, name
    for here, there in zip(found.movements, one.movements, strict=True):
        assert here.max_prob == pytest.approx(there.max_prob, rel=1e-3)


def test_winners_are_the_largest_logits_and_move(outcomes: dict[int, Outcome]) -> None:
    one, pattern = outcomes[1], Pattern(8, 16)
    for name, mask in one.masks.items():
        assert torch.equal(mask, pattern.best(one.logits[name].transpose(1, 2).flatten(1))), name
    last = one.movements[-1]
    assert last.prior_difference is not None
    assert 0 < last.prior_difference < 1 and 0 < last.max_prob < 1
    changed = [
        name
        for name, logits in one.bits["initial"].items()
        if not torch.equal(logits, one.logits[name])
    ]
    assert len(changed) == len(one.logits)
