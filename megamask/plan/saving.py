"""Bytes and seconds of a snapshot, against the seconds that a launcher grants after its signal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megamask.config import Config
from megamask.plan.hardware import GPUS_A_NODE
from megamask.plan.workload import Workload

RANK_RATE, NODE_RATE = 1e9, 4e9  # bytes per second to disk, of a rank and of a node: assumed
TORCHRUN_SECONDS = 30.0  # of torchrun between SIGTERM and SIGKILL, unless told otherwise
# Below this size a snapshot takes about a second, whatever the disk.
SMALL = 1e9


@dataclass(frozen=True)
class Saving:
    """A snapshot of a run.

    Attributes:
        rank_bytes: bytes that the busiest rank writes.
        node_bytes: bytes that the ranks of a node write.
        total_bytes: bytes of the snapshot.
    """

    rank_bytes: float
    node_bytes: float
    total_bytes: float

    @property
    def seconds(self) -> float:
        """Seconds to write it, at the assumed rates."""
        return max(self.rank_bytes / RANK_RATE, self.node_bytes / NODE_RATE)


def saving_of(work: Workload) -> Saving:
    """The snapshot of ``work``.

    One replica writes the logits. Optimizer state is written by the replica that updates it: the
    same one, or with a distributed optimizer each its own part. The busiest node holds the ranks of
    the first replica, as many as fit, and beside them ranks that write moments alone.
    """
    rank, tp = work.saved_bytes, work.tp
    logits = work.mean(lambda one: work.method.logit_bytes(work.state_of(one)))
    moments = rank - work.masked_weights * logits
    divided = work.config.learn.optimizer.distributed and not work.forward_passes
    writers = tp * (work.dp if divided else 1)
    local = min(writers, GPUS_A_NODE)
    first = min(tp, local)
    node = rank * first + moments * (local - first)
    return Saving(rank, node, rank * tp + moments * (writers - tp))


def seconds_after_a_signal(config: Config, saving: Saving) -> float:
    """Seconds until a run that was asked to leave has saved: a snapshot that is being written
    beside the steps is waited for, and the signal's own follows.
    """
    return saving.seconds * (2 if config.learn.snapshot.background else 1)


def grace_of(config: Config, environment: Mapping[str, str] = os.environ) -> tuple[str, float]:
    """Who ends a run that was asked to leave, and after how many seconds; infinity where nobody
    does.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        text = environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
        seconds = float(text) if text.isdigit() else TORCHRUN_SECONDS
        return "torchrun (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)", seconds
    if "SLURM_JOB_ID" in environment:
        return "Slurm (launch.warning)", float(config.launch.warning)
    return "nobody", float("inf")


def grace_warning(
    config: Config, saving: Saving, environment: Mapping[str, str] = os.environ
) -> str | None:
    """A sentence where a snapshot may take longer than the launcher waits; else None."""
    who, grace = grace_of(config, environment)
    needed = seconds_after_a_signal(config, saving)
    if saving.rank_bytes < SMALL or needed <= grace:
        return None
    waits = (
        f"a signal may have to wait for one and write another, {needed:,.0f} s, "
        if config.learn.snapshot.background
        else ""
    )
    return (
        f"a snapshot of {saving.total_bytes / 1e9:,.0f} GB takes about {saving.seconds:,.0f} s at "
        f"{RANK_RATE / 1e9:g} GB/s a rank and {NODE_RATE / 1e9:g} a node, {waits}and {who} ends "
        f"the run {grace:,.0f} s after its signal: the run would then go on from the snapshot "
        "before. Raise the grace, or take learn.memory=lean"
    )


def host_warning(saving: Saving, available: float) -> str | None:
    """A sentence where the copy of a snapshot may not fit the host memory of a node of GPUs; else
    None.

    Args:
        saving: the snapshot.
        available: bytes of the host that programs can have.
    """
    if saving.node_bytes <= available:
        return None
    return (
        f"a snapshot is written from a copy of {saving.node_bytes / 1e9:,.0f} GB in the host "
        f"memory of a node, and {available / 1e9:,.0f} GB are available on this one: the run may "
        "be ended there. Take learn.memory=lean or more nodes, or give the job more memory"
    )


def saving_lines(work: Workload) -> list[str]:
    """The snapshot in words, for ``plan``."""
    saving, section = saving_of(work), work.config.learn.snapshot
    copy = f"from a copy of {saving.node_bytes / 1e9:,.1f} GB in the host memory of a node"
    when = f"{'beside the next' if section.background else 'between two'} steps, {copy}"
    needed = seconds_after_a_signal(work.config, saving)
    after = (
        f", after the snapshot that may be on its way, about {needed:,.0f} s for both"
        if section.background
        else ""
    )
    lines = [
        f"A snapshot has {saving.total_bytes / 1e9:,.1f} GB and takes about "
        f"{saving.seconds:,.0f} s (assumed: {RANK_RATE / 1e9:g} GB/s a rank, "
        f"{NODE_RATE / 1e9:g} a node):",
        f"- Every {section.every} steps it is written {when}.",
        "- After a signal, the step that it comes in and the evaluation of that step, it must be "
        f"whole within the launcher's grace{after}: "
        f"{TORCHRUN_SECONDS:.0f} s of torchrun unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says more "
        f"(launch/learn.sh: 600), {work.config.launch.warning} s of Slurm (launch.warning).",
    ]
    if saving.rank_bytes >= SMALL and needed > TORCHRUN_SECONDS:
        lines.append("- **It takes longer than torchrun's own grace.**")
    return lines
