"""What tests that learn in several layouts share: jobs in turn, and the steps of one, with a
snapshot on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.learn.snapshot import Progress, Snapshots
from megamask.parallel.mesh import Mesh, start
from tests.parallel.ranks import meet_again

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def in_turn(
    learn: Callable[[Config, Mesh, Job], Outcome],
    settings: Callable[[Job], Config],
    jobs: Sequence[Job],
) -> list[Outcome]:
    """``learn`` of every job with its ``settings``. Jobs of one tensor parallel size that follow
    each other share a rendezvous, which takes longer than a step.
    """
    outcomes = []
    planned = [(settings(job), job) for job in jobs]
    for _, group in groupby(planned, key=lambda one: one[0].parallel.tp):
        alike = list(group)
        with start(alike[0][0]) as mesh:
            outcomes += [learn(config, mesh, job) for config, job in alike]
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
