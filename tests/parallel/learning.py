"""What tests that learn in several layouts share: jobs in turn, and the steps of one, with a
snapshot on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megamask.data.batches import BatchPlan
from megamask.learn.snapshot import Progress, Snapshots
from tests.parallel.ranks import meet_again

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def in_turn(learn: Callable[[Job], Outcome], jobs: Sequence[Job]) -> list[Outcome]:
    """``learn`` of every job, each with a rendezvous of its own."""
    outcomes = []
    for job in jobs:
        outcomes.append(learn(job))
        meet_again()
    return outcomes


def take_steps(
    snapshots: Snapshots, samples: Any, save_at: int | None = None, resume: bool = False
) -> tuple[int, list[Any]]:
    """Let the learner of ``snapshots`` learn to the end of its run.

    Args:
        snapshots: where to save and what to save.
        samples: by number.
        save_at: steps after which a snapshot is saved.
        resume: from the newest snapshot.

    Returns:
        The first step, and what every step from there on gave.
    """
    section, mesh = snapshots.config.learn, snapshots.mesh
    plan = BatchPlan(samples, section.global_batch, section.micro_batch, mesh.dp, mesh.dp_rank)
    first, results = snapshots.restore().step if resume else 0, []
    for step in range(first, section.steps):
        results.append(snapshots.learner.step(step, plan))
        if step + 1 == save_at:
            snapshots.save(Progress(step=step + 1))
    return first, results
