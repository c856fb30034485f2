"""Snapshots that are written beside the next steps: what they hold, and what is left when the run
or the writer dies.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config.load import build_config
from megamask.errors import EXIT_UNAVAILABLE, ArtifactError, ConfigError
from megamask.learn.gumbel import GradientLearner
from megamask.learn.snapshot import Progress, Snapshots
from megamask.model.background_save import _as_child
from tests.unit.learn.one_rank import tiny_config, tiny_masked_model, tiny_plan

Tensors = list[torch.Tensor]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Snapshots, Any]]:
    """Snapshots of a learner that has taken a step, and the batches of its run."""
    config = tiny_config({"snapshot": {"keep": 2}})
    with tiny_masked_model(config) as (mesh, masked_model):
        learner = GradientLearner(config, mesh, masked_model)
        plan = tiny_plan(config, mesh)
        learner.step(0, plan)
        yield Snapshots(tmp_path / "snapshots", config, mesh, masked_model, learner), plan


def state_of(snapshots: Snapshots) -> Tensors:
    learner: Any = snapshots.learner
    tensors = [*snapshots.masked_model.mask_logits, *learner.optimizer.state_tensors()]
    return [tensor.detach().clone() for tensor in tensors]


def same(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_snapshot_holds_the_moment_at_which_it_was_begun(run: tuple[Snapshots, Any]) -> None:
    snapshots, plan = run
    before = state_of(snapshots)
    snapshots.begin(Progress(step=1))
    snapshots.learner.step(1, plan)  # overwrites logits and moments while they are written
    after = state_of(snapshots)
    assert not same(before, after)
    assert snapshots.steps() == []  # not there before it is whole
    snapshots.background.proceed(wait=True)
    assert snapshots.steps() == [1] and files(snapshots.folder) == ["step-00000001"]

    assert snapshots.restore().step == 1
    assert same(state_of(snapshots), before)
    snapshots.learner.step(1, plan)
    assert same(state_of(snapshots), after)  # bit for bit as without the detour


def test_snapshots_follow_each_other_and_old_ones_go(run: tuple[Snapshots, Any]) -> None:
    snapshots, plan = run
    for step in (1, 2, 3):
        snapshots.begin(Progress(step=step))
        assert snapshots.steps() == list(range(1, step))[-2:]  # the one before is whole by now
        snapshots.learner.step(step, plan)
    while not snapshots.background.proceed():  # as the loop asks after every step
        time.sleep(0.01)
    assert files(snapshots.folder) == ["step-00000002", "step-00000003"]
    snapshots.begin(Progress(step=4))
    snapshots.save(Progress(step=5))  # a signal came: the running one first
    assert files(snapshots.folder) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("call", ["rmdir", "rename"])
def test_an_old_snapshot_that_does_not_go_ends_no_run(
    call: str, run: tuple[Snapshots, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, where a file that a reader has open keeps a name in its folder."""
    snapshots, _ = run
    real = getattr(os, call)

    def refuse(path: Any, *more: Any, **options: Any) -> None:
        if "step-00000001" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        real(path, *more, **options)

    snapshots.save(Progress(step=1))
    with monkeypatch.context() as failing:
        failing.setattr(os, call, refuse)
        snapshots.save(Progress(step=2))
        snapshots.begin(Progress(step=3))
        snapshots.background.proceed(wait=True)
    assert snapshots.steps() == ([2, 3] if call == "rmdir" else [1, 2, 3])
    assert len(files(snapshots.folder)) == 3  # it is there, and nobody takes a part for the whole
    snapshots.save(Progress(step=4))
    assert files(snapshots.folder) == ["step-00000003", "step-00000004"]


def test_tensors_of_a_gpu_are_copied_to_pageable_memory(
    run: tuple[Snapshots, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page-locked memory is rounded up and kept: a copy that does not block asks for it."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    snapshots, _ = run
    preload, asked = FileSystemWriterAsync.preload_tensors, list[bool]()

    def copy(buckets: Any, non_blocking: bool = True) -> Any:
        asked.append(non_blocking)
        return preload(buckets, non_blocking)

    monkeypatch.setattr(FileSystemWriterAsync, "preload_tensors", staticmethod(copy))
    snapshots.save(Progress(step=1))
    snapshots.begin(Progress(step=2))
    snapshots.settle()
    assert asked == [False, False] and snapshots.steps() == [1, 2]


def test_a_writer_that_is_killed_is_told_and_the_snapshot_before_stays(
    run: tuple[Snapshots, Any],
) -> None:
    snapshots, _ = run
    snapshots.save(Progress(step=1))
    snapshots.begin(Progress(step=2))
    queue: Any = snapshots.background._queue
    os.kill(queue.async_calls[0].async_caller.process.pid, signal.SIGKILL)
    with pytest.raises(ArtifactError, match="step-00000002: could not be written.*goes on") as told:
        snapshots.background.proceed(wait=True)
    assert told.value.code == EXIT_UNAVAILABLE  # a launcher starts the run again
    assert files(snapshots.folder) == ["step-00000001"]
    assert snapshots.background.proceed()  # nothing is being written
    snapshots.begin(Progress(step=3))
    snapshots.background.abandon()
    assert files(snapshots.folder) == ["step-00000001"]
    snapshots.begin(Progress(step=4))
    snapshots.background.proceed(wait=True)
    assert snapshots.steps() == [1, 4] and snapshots.restore().step == 4


def again(snapshots: Snapshots, **learn: Any) -> Snapshots:
    """The same run started again with other settings."""
    section = {**snapshots.config.learn.model_dump(exclude_unset=True), **learn}
    return Snapshots(
        snapshots.folder,
        build_config({**snapshots.config.model_dump(exclude_unset=True), "learn": section}),
        snapshots.mesh,
        snapshots.masked_model,
        snapshots.learner,
    )


def test_a_change_that_no_step_is_left_to_read_is_refused(run: tuple[Snapshots, Any]) -> None:
    snapshots, _ = run
    snapshots.save(Progress(step=4))
    rate = {"optimizer": {"lr": 0.003}}
    fewer = again(snapshots, steps=3)
    assert fewer.restore().step == 4 and fewer.changes == []
    for settings in (rate, {**rate, "steps": 3}, {"sampling": {"tau": [1, 0.2]}}):
        with pytest.raises(
            ConfigError, match=r"all 4 steps were learned with .*raise learn\.steps"
        ):
            again(snapshots, **settings).restore()
    more = again(snapshots, **rate, steps=6)
    assert more.restore().step == 4
    assert [one.setting for one in more.changes] == ["learn.optimizer.lr", "learn.steps"]


def test_a_rate_that_follows_from_other_settings_is_told_too(
    run: tuple[Snapshots, Any], caplog: pytest.LogCaptureFixture
) -> None:
    snapshots, _ = run
    derived = again(snapshots, optimizer={"lr": None}, prior={"mask": None})
    derived.save(Progress(step=2))
    # the same settings, and a step count whose rate is the same to the last bit: nothing to tell
    assert derived.restore().step == 2 and derived.changes == []
    # without a prior's margins the rate is std / (2 sqrt(steps)), here of four times the steps
    longer = again(derived, steps=16)
    assert longer.restore().step == 2
    found = {one.setting: (one.before, one.after) for one in longer.changes}
    assert found.pop("learn.steps") == (4, 16)
    # the mean gradient spans a sixth of 16 steps, and two steps at least
    assert found.pop("learn.optimizer.betas[0]") == (0.5, pytest.approx(1 - 6 / 16))
    ((before, after),) = found.values()
    assert list(found) == ["learn.optimizer.lr"] and before == pytest.approx(2 * after, rel=1e-12)
    assert "changed for this run: learn.optimizer.lr" in caplog.text
    # a rate that is given from now on is a setting of its own
    given = again(derived, optimizer={"lr": 0.003})
    assert given.restore().step == 2
    assert [(one.setting, one.before) for one in given.changes] == [("learn.optimizer.lr", None)]


def test_decay_rates_that_were_given_before_they_were_derived_are_no_change(
    run: tuple[Snapshots, Any],
) -> None:
    """Every run of before the derivation says 0.9 and 0.95, also one that has all its steps."""
    long = {"steps": 60}
    before = again(run[0], optimizer={"betas": (0.9, 0.95)}, **long)
    for step in (2, 60):
        before.save(Progress(step=step))
        now = again(before, optimizer={"betas": None}, **long)
        assert now.restore().step == step and now.changes == []
        now.save(Progress(step=step))
        assert before.restore().step == step and before.changes == []
    # in a run of 4 steps the derived rate is another
    short = again(run[0], optimizer={"betas": (0.9, 0.95)})
    shutil.rmtree(short.folder)
    short.save(Progress(step=2))
    other = again(short, optimizer={"betas": None})
    assert other.restore().step == 2
    assert [one.setting for one in other.changes] == ["learn.optimizer.betas"]


def test_a_run_can_be_ended_within_its_warm_up(run: tuple[Snapshots, Any]) -> None:
    longer = again(run[0], steps=9, optimizer={"warmup_steps": 5})
    longer.save(Progress(step=4))
    ended = again(longer, steps=4, optimizer={"warmup_steps": 3})
    assert ended.restore().step == 4


@pytest.mark.parametrize(
    ("sampling", "is_told"),
    [({}, False), ({"noise": 1.0}, True), ({"noise": 1.0, "draws": "step"}, False)],
)
def test_another_micro_batch_is_told_where_noise_is_drawn_for_each(
    run: tuple[Snapshots, Any], sampling: dict[str, Any], is_told: bool
) -> None:
    first = again(run[0], sampling=sampling, micro_batch=2)
    first.save(Progress(step=2))
    second = again(first, micro_batch=1)
    assert second.restore().step == 2
    told = [(one.setting, one.before, one.after) for one in second.changes]
    assert told == ([("learn.micro_batch", 2, 1)] if is_told else [])
    first.save(Progress(step=4))  # all steps: no step is left that would draw
    finished = again(first, micro_batch=1)
    assert finished.restore().step == 4 and finished.changes == []


def test_a_full_disk_is_one_message(
    run: tuple[Snapshots, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    snapshots, _ = run
    monkeypatch.setattr(filesystem_async, "_write_item", full)  # the writer is a fork
    snapshots.begin(Progress(step=1))
    with pytest.raises(ArtifactError, match="(?i)no space left"):
        snapshots.background.proceed(wait=True)
    assert files(snapshots.folder) == []


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_writer_ends_with_its_run() -> None:
    """Left alone, the writer would keep the lock of a killed run, and its restart would be
    refused.
    """
    context = multiprocessing.get_context("fork")
    told, tell = os.pipe()

    def write() -> None:
        grandchild = context.Process(target=time.sleep, args=(60,))
        grandchild.start()
        os.write(tell, f"{os.getpid()} {grandchild.pid}\n".encode())
        time.sleep(60)

    run = os.fork()
    if run == 0:
        try:
            context.Process(target=_as_child, args=(write, os.getpid())).start()
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(told) as lines:
        numbers = [int(word) for word in lines.readline().split()]
    assert len(numbers) == 2 and all(Path(f"/proc/{number}").exists() for number in numbers)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    end = time.monotonic() + 20
    while any(is_running(number) for number in numbers):
        assert time.monotonic() < end, "a writer outlived its run"
        time.sleep(0.02)


def is_running(number: int) -> bool:
    """Whether a process exists and is no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
