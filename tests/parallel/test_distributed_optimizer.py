"""A distributed optimizer learns the same bits as one that every replica keeps whole, and their
snapshots are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import Config
from megamask.config.presets import MEMORIES
from megamask.learn.gumbel import GradientLearner, GradientResult
from megamask.learn.masked_model import build_masked_model
from megamask.learn.snapshot import Snapshots
from megamask.optim.zero1 import Replicas
from megamask.parallel.mesh import Mesh
from megamask.prepare.run_inputs import LearnInputs
from tests.parallel.learning import in_turn, take_steps
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Chains, config_of, gather_logits

pytestmark = pytest.mark.slow
STEPS, SAVED_AT = 4, 2
UNMEASURED: dict[str, Any] = dict.fromkeys(("signal_share", "below_epsilon", "relative_step"))
KINDS: dict[str, Any] = {
    "adamw": {"weight_norm": (1e-4, 1e-4)},
    "once": {
        "sampling": {"draws": "step"}
    },  # sums start when the mask backward of a layer is done, not in the backward pass
    "lean": MEMORIES["lean"]["learn"],
    "leanest": MEMORIES["leanest"]["learn"],
}


@dataclass(frozen=True)
class Job:
    """One run of ``kind``: its layout, where it saves or resumes, what is broken."""

    kind: str
    distributed: bool = True
    tp: int = 1
    save_to: str | None = None
    resume_from: str | None = None
    forgets_to_share: bool = False


def resumed_by_either(kind: str) -> dict[str, Job]:
    """Whole and distributed, and distributed from the snapshot of either."""
    return {
        f"{kind}-whole": Job(kind, distributed=False, save_to=f"{kind}-whole"),
        kind: Job(kind, save_to=f"{kind}-parts"),
        f"{kind}-from-whole": Job(kind, resume_from=f"{kind}-whole"),
        f"{kind}-from-parts": Job(kind, resume_from=f"{kind}-parts"),
    }


WITHOUT = ("once", "leanest")  # a resume


@dataclass
class Outcome:
    """What every step measured, the last logits by HF module name, bytes of moments on this rank,
    layers summed before the end.
    """

    results: list[GradientResult] = field(default_factory=list)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    moment_bytes: int = 0
    early: set[int] = field(default_factory=set)


JOBS: list[tuple[int, dict[str, Job]]] = [  # ranks, and what they learn one after the other
    (
        2,
        {
            **{f"{kind}-whole": Job(kind, distributed=False) for kind in WITHOUT},
            **{kind: Job(kind) for kind in WITHOUT},
        },
    ),
    *((2, resumed_by_either(kind)) for kind in ("adamw", "lean")),
    (
        4,
        {
            "adamw-tp2-whole": Job("adamw", distributed=False, tp=2),
            "adamw-tp2": Job("adamw", tp=2),
            "lean-tp2-whole": Job("lean", distributed=False, tp=2),
            "lean-tp2": Job("lean", tp=2),
            "adamw-tp2-wrong": Job("adamw", tp=2, forgets_to_share=True),
        },
    ),
    (
        1,
        {
            "adamw-one-from-whole": Job("adamw", distributed=False, resume_from="adamw-whole"),
            "adamw-one-from-parts": Job(
                "adamw", resume_from="adamw-parts"
            ),  # distributed over itself alone: no effect
        },
    ),
]


def learn_all(rank: int, run_dir: Path, folder: Path, jobs: list[Job]) -> list[Outcome]:
    return in_turn(partial(learn, folder), partial(settings, run_dir), jobs)


def settings(run_dir: Path, job: Job) -> Config:
    section = KINDS[job.kind]
    optimizer = {**section.get("optimizer", {}), "distributed": job.distributed}
    learned = {**section, "steps": STEPS, "optimizer": optimizer, "monitor": {"measure_every": 1}}
    return config_of(run_dir, job.tp, learned)


def learn(folder: Path, config: Config, mesh: Mesh, job: Job) -> Outcome:
    masked_model = build_masked_model(LearnInputs(config), mesh)
    learner = GradientLearner(config, mesh, masked_model)
    snapshots = Snapshots(
        folder / (job.save_to or job.resume_from or "none"), config, mesh, masked_model, learner
    )
    outcome = Outcome()
    if learner.replicas:
        watch_sums(learner.replicas, outcome)
        if job.forgets_to_share:
            learner.replicas.share_logits = lambda: None  # type: ignore[method-assign]
    _, outcome.results = take_steps(
        snapshots,
        Chains(),
        SAVED_AT if job.save_to else None,
        resume=job.resume_from is not None,
    )
    outcome.logits = gather_logits(masked_model, mesh)
    outcome.moment_bytes = sum(one.nbytes for one in learner.optimizer.state_tensors())
    return outcome


def watch_sums(replicas: Replicas, outcome: Outcome) -> None:
    finish = replicas.finish_sums

    def watched() -> None:
        outcome.early |= set(replicas._sums)
        finish()

    replicas.finish_sums = watched  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def outcomes(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Of every rank, by job."""
    folder, found = tmp_path_factory.mktemp("snapshots"), {}
    for world, jobs in JOBS:
        by_rank = run_ranks(learn_all, world, tiny_run, folder, list(jobs.values()))
        found.update(
            {name: [outcomes[number] for outcomes in by_rank] for number, name in enumerate(jobs)}
        )
    return found


def same_bits(found: Outcome, expected: Outcome) -> bool:
    equal = all(torch.equal(found.logits[name], logits) for name, logits in expected.logits.items())
    whole = expected.results[-len(found.results) :]
    return equal and [replace(one, **UNMEASURED) for one in found.results] == [
        replace(one, **UNMEASURED) for one in whole
    ]


@pytest.mark.parametrize("kind", ["adamw", "lean", "adamw-tp2"])
def test_updates_are_measured_alike(outcomes: dict[str, list[Outcome]], kind: str) -> None:
    """Whole and divided: the same numbers, added up in another order, 2,000 roundings of 1e-16 at
    most. Two tensor-parallel ranks: gradients of fp32 sums in another order, which differ by 1e-6
    and move few logits over epsilon. Half of the logits would give half of the sums.
    """
    for found, expected in zip(outcomes[kind], outcomes[f"{kind}-whole"], strict=True):
        for one, other in zip(found.results, expected.results, strict=True):
            assert _measured(one) == pytest.approx(_measured(other), rel=1e-12)
    last = _measured(outcomes[kind][0].results[-1])
    assert last[-1] > 0  # the move; signal and small gradients may be none in so short a run
    if kind == "adamw-tp2":
        assert last == pytest.approx(_measured(outcomes["adamw"][0].results[-1]), rel=0.02)


def _measured(result: GradientResult) -> list[Any]:
    return [getattr(result, name) for name in UNMEASURED]


# The sum of two gradients has one order: no tolerance. More replicas may add up in another order.
@pytest.mark.parametrize("kind", ["adamw", "once", "lean", "leanest", "adamw-tp2", "lean-tp2"])
def test_it_learns_the_same_bits_on_every_rank(
    outcomes: dict[str, list[Outcome]], kind: str
) -> None:
    for found, expected in zip(outcomes[kind], outcomes[f"{kind}-whole"], strict=True):
        assert len(found.results) == STEPS
        assert same_bits(found, expected)


def test_the_comparison_sees_logits_that_are_not_shared(outcomes: dict[str, list[Outcome]]) -> None:
    assert not same_bits(outcomes["adamw-tp2-wrong"][0], outcomes["adamw-tp2-whole"][0])


@pytest.mark.parametrize("kind", ["adamw", "once", "lean", "leanest", "adamw-tp2", "lean-tp2"])
def test_moments_are_divided(outcomes: dict[str, list[Outcome]], kind: str) -> None:
    parts, whole = (
        [one.moment_bytes for one in outcomes[kind]],
        [one.moment_bytes for one in outcomes[f"{kind}-whole"]],
    )
    assert sum(parts) == sum(whole) // 2
    assert max(parts) < 0.55 * whole[0]  # eight layers of four sizes


@pytest.mark.parametrize("kind", ["adamw", "once"])
def test_sums_start_before_the_backward_pass_is_over(
    outcomes: dict[str, list[Outcome]], kind: str
) -> None:
    assert all(one.early == set(range(8)) for one in outcomes[kind])


@pytest.mark.parametrize(
    "resumed", ["adamw-from-whole", "adamw-from-parts", "lean-from-whole", "lean-from-parts"]
)
def test_it_resumes_from_either_snapshot(outcomes: dict[str, list[Outcome]], resumed: str) -> None:
    for found, expected in zip(
        outcomes[resumed], outcomes[f"{resumed.split('-')[0]}-whole"], strict=True
    ):
        assert len(found.results) == STEPS - SAVED_AT
        assert same_bits(found, expected)


def test_one_process_reads_the_same_from_either_snapshot(
    outcomes: dict[str, list[Outcome]],
) -> None:
    assert len(outcomes["adamw-one-from-parts"][0].results) == STEPS - SAVED_AT
    assert same_bits(outcomes["adamw-one-from-parts"][0], outcomes["adamw-one-from-whole"][0])
