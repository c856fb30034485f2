"""Learning from the dense model: the same in every layout and after a resume, and what the teacher
is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import Config
from megamask.learn.gumbel import GradientLearner, GradientResult
from megamask.learn.masked_model import MaskedModel, build_masked_model
from megamask.learn.snapshot import Snapshots
from megamask.model.language_model import TokenLosses
from megamask.model.objective import dense_hidden, loss_of
from megamask.parallel.mask_context import RunningSample
from megamask.parallel.mesh import Mesh, start
from megamask.parallel.step_draw import StepDraws
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey
from tests.parallel.learning import in_turn, take_steps
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Chains, config_of, gather_logits

pytestmark = pytest.mark.slow
STEPS, SAVED_AT = 4, 2
MIX: dict[str, Any] = {"share": 0.7, "temperature": 2.0, "hidden": 0.5}
LONGER: dict[str, Any] = {
    "steps": 20,
    "optimizer": {"lr": 5e-3, "schedule": "constant"},
    "sampling": {"tau": (1.0, 1.0), "kappa": (100.0, 100.0)},
}
LEAN: dict[str, Any] = {"logits": "bf16", "grads": "bf16", "masked_weight": "regenerate"}


@dataclass(frozen=True)
class Job:
    """One run: its loss, its layout, where it saves or resumes."""

    loss: dict[str, Any] = field(default_factory=lambda: MIX)
    tp: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    learn: dict[str, Any] = field(default_factory=dict)
    save: bool = False
    resume: bool = False


@dataclass
class Outcome:
    """What a run measured at every step from ``first`` on, and its last logits by HF module
    name.
    """

    first: int
    results: list[GradientResult]
    logits: dict[str, torch.Tensor]


ONE_DRAW, TOP = {"sampling": {"draws": "step"}}, {**MIX, "top_k": 20}
JOBS: dict[int, dict[str, Job]] = {
    1: {
        "one": Job(save=True),
        "one-resumed": Job(resume=True),
        "one-recompute": Job(parallel={"recompute": True}),
        "one-regenerate": Job(learn={"state": {"masked_weight": "regenerate"}}),
        "one-step": Job(learn=ONE_DRAW),
        "one-step-recompute": Job(learn=ONE_DRAW, parallel={"recompute": True}),
        "one-top": Job(TOP),
        "one-kd": Job({"share": 1}, learn=LONGER),
        "one-kd-top": Job({**TOP, "share": 1}, learn={**LONGER, "state": LEAN}),
        "one-kd-short": Job({**MIX, "share": 1, "hidden": 0}),
        "one-lm": Job({"share": 0}),
        "one-hidden": Job({"share": 0, "hidden": 0.5}),
        "one-share": Job({**MIX, "share": 0.71}),
        "one-other": Job({**MIX, "hidden": 0.505}),
    },
    2: {
        "tp2": Job(tp=2),
        "tp2-sp": Job(tp=2, parallel={"sequence_parallel": True}),
        "tp2-step": Job(tp=2, learn=ONE_DRAW),
        "tp2-sp-top": Job(TOP, tp=2, parallel={"sequence_parallel": True}),
        "dp2": Job(),
    },
}


def learn_all(rank: int, run_dir: Path, snapshots: Path, jobs: list[Job]) -> list[Outcome]:
    return in_turn(partial(learn, snapshots), partial(settings, run_dir), jobs)


def settings(run_dir: Path, job: Job) -> Config:
    learned = {
        "steps": STEPS,
        "optimizer": {"lr": 2e-3},
        "weight_norm": (1e-4, 1e-4),
        "distillation": job.loss,
        **job.learn,
    }
    return config_of(run_dir, job.tp, learned, **job.parallel)


def learn(folder: Path, config: Config, mesh: Mesh, job: Job) -> Outcome:
    masked_model = build_masked_model(LearnInputs(config), mesh)
    name = "saved" if job.save or job.resume else "none"
    snapshots = Snapshots(
        folder / name, config, mesh, masked_model, GradientLearner(config, mesh, masked_model)
    )
    first, results = take_steps(snapshots, Chains(), SAVED_AT if job.save else None, job.resume)
    return Outcome(first, results, gather_logits(masked_model, mesh))


@pytest.fixture(scope="module")
def outcomes(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("snapshots")
    found: dict[str, Outcome] = {}
    for world, jobs in JOBS.items():
        by_rank = run_ranks(learn_all, world, tiny_run, folder, list(jobs.values()))
        assert all(
            [one.results for one in rank] == [one.results for one in by_rank[0]] for rank in by_rank
        )
        found.update(zip(jobs, by_rank[0], strict=True))
    return found


# As in test_learning_layouts: layouts sum in fp32 in other orders. kd is a difference of
# log-probabilities of the size of lm.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 2e-5


def curve_error(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """Largest difference of the losses, relative to lm, and relative one of the gradient norms,
    over the steps that both have.
    """
    pairs = list(zip(found.results, expected.results[found.first :], strict=True))
    losses = [
        abs(getattr(a, name) - getattr(b, name)) / b.lm_loss
        for a, b in pairs
        for name in ("lm_loss", "kd_loss", "hidden_loss", "loss")
    ]
    return max(losses), max(abs(a.grad_norm / b.grad_norm - 1) for a, b in pairs)


def same_bits(found: Outcome, expected: Outcome) -> bool:
    equal = all(torch.equal(found.logits[name], logits) for name, logits in expected.logits.items())
    return equal and found.results == expected.results[found.first :]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("tp2", "one"),
        ("tp2-sp", "one"),
        ("dp2", "one"),
        ("tp2-step", "one-step"),
        ("tp2-sp-top", "one-top"),
    ],
)
def test_every_layout_learns_the_same(
    outcomes: dict[str, Outcome], layout: str, expected: str
) -> None:
    losses, gradients = curve_error(outcomes[layout], outcomes[expected])
    assert losses < LOSS_TOLERANCE and gradients < GRADIENT_TOLERANCE, (losses, gradients)


@pytest.mark.parametrize("other", ["one-share", "one-other"])
def test_the_comparison_sees_one_percent(outcomes: dict[str, Outcome], other: str) -> None:
    losses, gradients = curve_error(outcomes[other], outcomes["one"])
    assert losses > 10 * LOSS_TOLERANCE and gradients > 10 * GRADIENT_TOLERANCE


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("one-recompute", "one"),
        ("one-regenerate", "one"),
        ("one-step-recompute", "one-step"),
        ("one-resumed", "one"),
    ],
)
def test_neither_recomputation_nor_a_resume_changes_a_bit(
    outcomes: dict[str, Outcome], choice: str, expected: str
) -> None:
    assert outcomes[choice].first == (SAVED_AT if choice == "one-resumed" else 0)
    assert same_bits(outcomes[choice], outcomes[expected])
    assert not same_bits(outcomes["one-share"], outcomes["one"])


def test_a_step_reports_all_losses_and_minimises_what_was_asked_for(
    outcomes: dict[str, Outcome],
) -> None:
    names = ("one-lm", "one-kd-short", "one-hidden", "one")
    lm, kd, layers, mix = (outcomes[name].results[0] for name in names)
    assert lm.kd_loss is None and lm.hidden_loss is None and layers.kd_loss is None
    assert lm.loss == lm.lm_loss - lm.weight_norm_term
    hidden = mix.hidden_loss
    assert hidden is not None and hidden > 0.01
    assert layers.hidden_loss == hidden and kd.hidden_loss is None
    assert layers.loss == pytest.approx(
        layers.lm_loss + 0.5 * hidden - layers.weight_norm_term, rel=LOSS_TOLERANCE
    )
    assert (
        kd.lm_loss == mix.lm_loss == pytest.approx(lm.lm_loss, rel=LOSS_TOLERANCE)
    )  # the same draw of the same logits
    assert kd.kd_loss is not None and mix.kd_loss is not None and kd.kd_loss > 0
    assert kd.loss == pytest.approx(kd.kd_loss - kd.weight_norm_term, rel=LOSS_TOLERANCE)
    assert mix.loss == pytest.approx(
        0.3 * mix.lm_loss + 0.7 * mix.kd_loss + 0.5 * hidden - mix.weight_norm_term,
        rel=LOSS_TOLERANCE,
    )


@pytest.mark.parametrize("run", ["one-kd", "one-kd-top"])
def test_the_masked_model_comes_closer_to_the_dense_one(
    outcomes: dict[str, Outcome], run: str
) -> None:
    losses = [result.kd_loss or 0.0 for result in outcomes[run].results]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])  # seen: 0.75


def look_at_teachers(rank: int, run_dir: Path) -> dict[str, Any]:
    """What teacher and losses are while nothing is drawn, within a draw, under a step's draw, and
    with folded masks.
    """
    config = config_of(run_dir, 1, {"distillation": {"share": 1}})
    found: dict[str, Any] = {}
    with start(config) as mesh:
        masked_model = build_masked_model(LearnInputs(config), mesh)
        batch = [
            torch.stack([Chains()[number][key] for number in range(2)])
            for key in ("tokens", "labels")
        ]
        found["plain"] = look(masked_model, config, batch)
        draw = Sample(NoiseKey(0, 0), 100.0, 1.0)
        masked_model.switch.running = RunningSample(draw)
        found["drawn"] = look(masked_model, config, batch)
        masked_model.switch.running = None
        draws = StepDraws(list(masked_model.linears.values()))
        draws.begin(draw, norm_coef=0.0, sums_in_fp32=False)
        found["step"] = look(masked_model, config, batch)
        draws.drop()
        for linear in masked_model.linears.values():
            linear.fold(linear.hard_mask())
        found["folded"] = look(masked_model, config, batch)
        found["folded-lm"] = masked_model.model.token_losses(*batch).detach()
    return found


def look(
    masked_model: MaskedModel, config: Any, batch: list[torch.Tensor]
) -> tuple[torch.Tensor, TokenLosses]:
    with torch.no_grad():
        tokens, labels = batch
        model, switch = masked_model.model, masked_model.switch
        losses = loss_of(config.learn.distillation, switch)(model, tokens, labels)
        return dense_hidden(model, tokens, switch), losses


def test_the_teacher_has_no_masks_whatever_is_drawn(tiny_run: Path) -> None:
    (found,) = run_ranks(look_at_teachers, 1, tiny_run)
    dense = found["plain"][0]
    assert all(torch.equal(found[state][0], dense) for state in ("drawn", "step", "folded"))
    assert (
        found["plain"][1].kd.abs().max() < 1e-6
    )  # teacher and student are one; roundings of an exponential
    assert all(found[state][1].kd.min() > 1e-3 for state in ("drawn", "step", "folded"))
    assert torch.equal(found["folded"][1].objective, found["folded"][1].kd)
    torch.testing.assert_close(
        found["folded"][1].lm, found["folded-lm"], rtol=1e-6, atol=1e-6
    )  # sums of 512 in fp32
