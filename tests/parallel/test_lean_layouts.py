"""Learning with bf16 logits: the same bits after a resume and, but for torchao's 8-bit AdamW, in
other layouts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.data.batches import BatchPlan
from megamask.learn.gumbel import GradientLearner, GradientResult
from megamask.learn.masked_model import MaskedModel, build_masked_model
from megamask.learn.snapshot import Progress, Snapshots
from megamask.parallel.mesh import Mesh, start
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.noise import NoiseKey, uniform, words
from tests.parallel.ranks import meet_again, run_ranks
from tests.parallel.tiny import Chains, config_of, gather_hf, gather_logits
from tests.unit.optim import lean

pytestmark = pytest.mark.slow
STEPS, SAVED_AT, ROUNDING = 12, 6, 3
GRADS = {
    "adamw": "bf16",
    "lion": "fp32",
    "lion8bit": "bf16",
    "adamw8bit": "fp32",
}  # the dtype of the gradients


@dataclass(frozen=True)
class Job:
    """One run of ``kind``: learn from text (or from keyed gradients), save or resume in the
    snapshots' folder of that name.
    """

    kind: str
    tp: int = 1
    save_to: str | None = None
    resume_from: str | None = None
    keyed: bool = False
    forgets: bool = False  # its momentum at the resume
    steps: int = STEPS


@dataclass
class Outcome:
    """Logits and moments of the whole model by HF module name, at the start (after a resume) and at
    the end.
    """

    results: list[GradientResult] = field(default_factory=list)
    first: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    last: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def jobs_of(kind: str) -> dict[int, dict[str, Job]]:
    """By world size, in the order in which they run."""
    return {
        1: {
            "one": Job(kind, save_to=kind),
            "one-resumed": Job(kind, resume_from=kind),
            "one-forgetful": Job(kind, resume_from=kind, forgets=True),
            "one-keyed": Job(kind, keyed=True),
        },
        2: {
            "tp2-from-one": Job(kind, tp=2, resume_from=kind),
            "tp2-keyed": Job(kind, tp=2, keyed=True),
        },
    }


def run_all(rank: int, run_dir: Path, folder: Path, jobs: list[Job]) -> list[Outcome]:
    outcomes = []
    for job in jobs:
        outcomes.append(run_one(run_dir, folder, job))
        meet_again()
    return outcomes


def run_one(run_dir: Path, folder: Path, job: Job) -> Outcome:
    state = {"logits": "bf16", "grads": GRADS[job.kind], "masked_weight": "regenerate"}
    rate = 3e-3 if job.kind == "adamw" else 1e-3  # Lion takes a third
    optimizer = {"kind": job.kind, "lr": rate, "min_lr": 1e-4, "betas": (0.9, 0.99)}
    config = config_of(run_dir, job.tp, {"steps": STEPS, "state": state, "optimizer": optimizer})
    outcome = Outcome()
    with start(config) as mesh:
        masked_model = build_masked_model(LearnInputs(config), mesh)
        learner = GradientLearner(config, mesh, masked_model)
        snapshots = Snapshots(
            folder / (job.save_to or job.resume_from or "none"), config, mesh, masked_model, learner
        )
        first = snapshots.restore().step if job.resume_from else 0
        if job.forgets:
            for tensor in learner.optimizer.state_tensors():
                tensor.zero_()
        outcome.first = everything(masked_model, learner, mesh)
        plan = BatchPlan(
            Chains(), config.learn.global_batch, config.learn.micro_batch, mesh.dp, mesh.dp_rank
        )
        for step in range(first, ROUNDING if job.keyed else job.steps):
            if job.keyed:
                keyed_step(masked_model, learner, step)
            else:
                outcome.results.append(learner.step(step, plan))
            if job.save_to and step + 1 == SAVED_AT:
                snapshots.save(Progress(step=SAVED_AT))
                outcome.saved = everything(masked_model, learner, mesh)
        outcome.last = everything(masked_model, learner, mesh)
    return outcome


def everything(
    masked_model: MaskedModel, learner: GradientLearner, mesh: Mesh
) -> dict[str, dict[str, torch.Tensor]]:
    moments = {
        name: dict(zip(masked_model.linears, ones, strict=True))
        for name, ones in learner.optimizer.moments().items()
    }
    return {
        "logits": gather_logits(masked_model, mesh),
        **{name: gather_hf(ones, masked_model, mesh) for name, ones in moments.items()},
    }


def keyed_step(masked_model: MaskedModel, learner: GradientLearner, step: int) -> None:
    """An update from gradients that are a function of the global group alone, hence the same in
    every layout.
    """
    for linear in masked_model.linears.values():
        logits: Any = linear.mask_logits
        noise = words(
            NoiseKey(77, step).of(linear.parameter_id),
            linear.site.placement.group_ids(logits.shape[2]),
            logits.shape[1],
        )
        logits.main_grad.copy_(0.01 * (uniform(noise).movedim(0, 1) - 0.5))
    learner.optimizer.step(step, 1e-3, torch.tensor(0.5))


@pytest.fixture(scope="module", params=["adamw", "lion", "lion8bit"])
def outcomes(
    request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("snapshots")
    found: dict[str, Outcome] = {}
    for world, jobs in jobs_of(request.param).items():
        by_rank = run_ranks(run_all, world, tiny_run, folder, list(jobs.values()))
        found.update(zip(jobs, by_rank[0], strict=True))
    return found


def same_bits(
    one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]
) -> bool:
    assert one.keys() == other.keys() and all(
        one[what].keys() == other[what].keys() for what in one
    )
    return all(
        torch.equal(one[what][name], tensor)
        for what, tensors in other.items()
        for name, tensor in tensors.items()
    )


def test_the_same_gradients_give_the_same_bits_at_tp_2(outcomes: dict[str, Outcome]) -> None:
    assert same_bits(outcomes["tp2-keyed"].first, outcomes["one-keyed"].first)
    assert same_bits(outcomes["tp2-keyed"].last, outcomes["one-keyed"].last)
    assert not same_bits(outcomes["one-keyed"].first, outcomes["one-keyed"].last)


def test_a_resume_changes_no_bit(outcomes: dict[str, Outcome]) -> None:
    whole, resumed = outcomes["one"], outcomes["one-resumed"]
    assert resumed.results == whole.results[SAVED_AT:]
    assert same_bits(resumed.last, whole.last)
    assert not same_bits(resumed.first, whole.first)


def test_tp_2_goes_on_from_a_snapshot_of_tp_1(outcomes: dict[str, Outcome]) -> None:
    """It starts from the same bits. Then sums round differently, and Lion takes the sign of updates
    that are near zero.
    """
    whole, resumed = outcomes["one"], outcomes["tp2-from-one"]
    assert same_bits(resumed.first, whole.saved)
    errors = [
        abs(a.lm_loss / b.lm_loss - 1)
        for a, b in zip(resumed.results, whole.results[SAVED_AT:], strict=True)
    ]
    assert max(errors) < 1e-6  # fp32 roundings, as in test_learning_layouts
    assert share_that_differs(resumed, whole) < 1e-3  # seen: none
    assert share_that_differs(outcomes["one-forgetful"], whole) > 0.1


def share_that_differs(one: Outcome, other: Outcome) -> float:
    pairs = [(one.last["logits"][name], logits) for name, logits in other.last["logits"].items()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)


def test_learning_happens(outcomes: dict[str, Outcome]) -> None:
    losses = [result.lm_loss for result in outcomes["one"].results]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])
    assert all(
        tensor.dtype == torch.bfloat16
        for tensors in outcomes["one"].last.values()
        for tensor in tensors.values()
    )


def run_all_eagerly(rank: int, run_dir: Path, folder: Path, jobs: list[Job]) -> list[Outcome]:
    """The same without torch.compile, which the update of torchao asks for."""
    with torch.compiler.set_stance("force_eager"):
        return run_all(rank, run_dir, folder, jobs)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run_all_eagerly, id="eager"),
        # compiles for half a minute
        pytest.param(run_all, id="compiled", marks=pytest.mark.nightly),
    ],
)
def test_8_bit_adamw_resumes_exactly(
    run: Callable[..., list[Outcome]], tiny_run: Path, tmp_path: Path
) -> None:
    jobs = [
        Job("adamw8bit", save_to="it"),
        Job("adamw8bit", resume_from="it"),
        Job("adamw8bit", resume_from="it", forgets=True),
    ]
    whole, resumed, forgetful = run_ranks(run, 1, tiny_run, tmp_path, jobs)[0]
    assert resumed.results == whole.results[SAVED_AT:]
    assert same_bits(resumed.last, whole.last)
    assert not same_bits(forgetful.last, whole.last)
    # The parts of a layer at TP 2 have other blocks, or are too small to be quantized.
    other = Job("adamw8bit", tp=2, resume_from="it", steps=0)
    for (found,) in run_ranks(run, 2, tiny_run, tmp_path, [other]):
        for name, apart in moments_apart(found.first, whole.saved).items():
            assert apart < 0.01, name  # as in tests/unit/optim/test_adamw_8bit.py
    assert min(moments_apart(whole.last, whole.saved).values()) > 0.05


def moments_apart(
    one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Moment -> the largest difference of its values, in units of the largest value of a linear."""
    from megamask.optim.adamw_8bit import AdamW8bit

    tables = AdamW8bit(lean.section("adamw8bit"), [lean.linear(lean.random_logits())], 0).tables
    found: dict[str, float] = {}
    for name, table in tables.items():

        def value(
            state: dict[str, dict[str, torch.Tensor]],
            of: str,
            name: str = name,
            table: torch.Tensor = table,
        ) -> torch.Tensor:
            return table[state[f"{name}.code"][of].int()] * state[f"{name}.scale"][of]

        found[name] = max(
            float((value(one, key) - value(other, key)).abs().max() / value(other, key).abs().max())
            for key in other[f"{name}.code"]
        )
    return found
