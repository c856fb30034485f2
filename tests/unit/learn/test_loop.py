"""How the loop ends: what is told, what the heartbeat says, and which code a launcher gets. The
model and its steps are stand-ins here; tests/e2e learns with real ones.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask import save_masks
from megamask.config import run_paths
from megamask.errors import EXIT_INTERRUPTED, EXIT_OK, ArtifactError, LearningError
from megamask.learn import loop, snapshot
from megamask.learn.evaluation import windows_digest
from megamask.learn.heartbeat import Heartbeat
from megamask.learn.learned_mask import WINDOWS
from megamask.learn.snapshot import Progress
from megamask.masks.times import times_path, write_seconds
from megamask.process.holder import Holder
from megamask.process.signals import STOP_FILE, StopRequest
from megamask.sparsity.pattern import Pattern
from megamask.storage import finite
from tests.unit.learn.one_rank import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A run after its first step, with a folder, a heartbeat and nothing to learn."""
    made: Any = object.__new__(loop.Run)
    made.config = tiny_config().model_copy(update={"run_dir": str(tmp_path)})
    made.paths = run_paths(made.config)
    made.paths.learn.mkdir()
    made.first_step = 0
    made.progress, made.holder = Progress(step=1), Holder.this_process("megamask learn")
    made.mesh = SimpleNamespace(is_main=True, world=1, any=bool, from_main=lambda value: value)
    made.monitor = SimpleNamespace(
        note=logging.getLogger("megamask.test").info, close=lambda: None, evaluation=lambda *_: None
    )
    background = SimpleNamespace(proceed=lambda wait=False: True, abandon=lambda: None)
    made.snapshots = SimpleNamespace(
        background=background,
        newest=lambda: 0,
        settle=lambda: None,
        save=lambda _: None,
        begin=lambda _: None,
    )
    return made


def state_of(run: Any) -> str:
    found = Heartbeat.read(run.paths.learn)
    assert found is not None
    return found.state


def fail() -> None:
    raise LearningError("the loss is not finite")


def test_a_snapshot_that_fails_does_not_hide_why_learning_failed(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def settle() -> None:
        raise ArtifactError("step-00000001", "could not be written", "Look at the disk.")

    run._step, run.snapshots.settle = fail, settle
    with pytest.raises(LearningError, match="the loss is not finite"):
        run._learn(StopRequest())
    assert state_of(run) == "failed" and "step-00000001: could not be written" in caplog.text


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_stop_while_a_signals_snapshot_is_saved_is_final(run: Any, is_asked: bool) -> None:
    stop = StopRequest()
    stop.watch(run.paths.learn)
    stop.received = "SIGTERM"
    file = run.paths.learn / STOP_FILE
    run.snapshots.save = lambda _: file.write_text("") if is_asked else None
    assert run._learn(stop) == (EXIT_OK if is_asked else EXIT_INTERRUPTED)
    assert state_of(run) == "interrupted" and not file.exists()


def test_each_batch_of_an_evaluation_is_a_sign_of_life(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation may take longer than parallel.timeout_minutes, each of its batches may not."""

    def evaluate(*given: Any) -> dict[str, float]:
        for _ in range(3):
            given[-1]()
        return {"code": 7.0}

    expected: list[str] = []
    monkeypatch.setattr(loop, "hard_mask_perplexity", evaluate)
    run.mesh.world, run.masked_model, run.windows = 2, None, {}
    run.watchdog = SimpleNamespace(expect=lambda what, _: expected.append(what))
    run.progress.best_score = 0.0
    assert run._evaluate() == {"code": 7.0}
    assert expected == ["progress after step 1"] * 4 and state_of(run) == "learning"


def test_an_evaluation_that_is_not_finite_is_no_best(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is smaller than a NaN, so as the best it would stay for ever; a snapshot holds null
    in its place, and a resumed run would take another mask for the best.
    """
    scores = {1: math.nan, 2: math.inf, 3: 9.0, 4: math.nan, 5: 11.0, 6: 8.0}
    saved: list[int] = []
    monkeypatch.setattr(
        loop, "hard_mask_perplexity", lambda *_: {"code": scores[run.progress.step]}
    )
    run.masked_model, run.windows = None, {}
    run._save_mask = lambda *_: saved.append(run.progress.step)
    for run.progress.step in scores:
        run._evaluate()
        note = json.loads(json.dumps(finite(asdict(run.progress))))
        assert Progress.read(note) == run.progress
    assert saved == [3, 6] and run.progress.best_step == 6
    assert run.progress.best_score == pytest.approx(math.log(8.0))
    assert Progress.read({"step": 1, "best_step": 0, "best_score": math.nan}).best_score is None


@pytest.mark.parametrize(("resumed", "stays"), [(0, False), (100, False), (110, True), (120, True)])
def test_a_best_mask_of_steps_that_are_not_gone_on_from_goes(
    run: Any, resumed: int, stays: bool
) -> None:
    """The run before had it from step 110, and was ended: this run resumes at another snapshot."""
    mask, pattern = run.paths.mask("learned-best"), Pattern(2, 4)
    masks = {"model.layers.0.mlp.up_proj": pattern.best(torch.arange(8.0).view(1, 8))}
    run.windows = {"code": torch.arange(8).view(2, 4)}
    known = windows_digest(run.windows)
    about = {"step": 110, WINDOWS: known, "perplexity": {"code": 8.0, "prose": 2.0}}
    found: Any = object.__new__(snapshot.Snapshots)
    found.folder = run.paths.learn / "snapshots"
    run.snapshots = found
    for number, measured in enumerate(("", known, "others"), 1):
        save_masks(mask, masks, "2:4", fingerprint="a", method="learned", evaluation=about)
        write_seconds(mask, 1.0)
        run.progress = Progress(resumed, 3.0, 80, measured)
        run._recall_best()
        assert [mask.exists(), times_path(mask).exists()] == [stays, stays]
        aside = run.paths.learn / f"snapshots-before-{number}"
        assert (aside / mask.name).exists() == (aside / times_path(mask).name).exists() != stays
        # the mask of step 80 is overwritten; a score of other windows does not compare
        kept = stays and measured != "others"
        score = pytest.approx(math.log(4.0)) if kept else None
        assert (run.progress.best_score, run.progress.best_step) == (score, 110 if kept else 0)
        assert run.progress.measured_on == windows_digest(run.windows)
    if stays:  # the file is the best of the note
        run.progress = Progress(resumed, 3.0, 110, "")
        run._recall_best()
        assert (run.progress.best_score, run.progress.best_step) == (3.0, 110)
        # a snapshot that was saved before the first evaluation on the windows of today: the score
        # of the file is of the windows of before, and the next evaluation is the best
        about[WINDOWS] = "others"
        save_masks(mask, masks, "2:4", fingerprint="a", method="learned", evaluation=about)
        run.progress = Progress(resumed, None, 0, known)
        run._recall_best()
        assert run.progress.best_score is None
    run.progress = Progress(resumed, 3.0, 0, "")  # the prior's own score has no mask
    mask.unlink(missing_ok=True)
    run._recall_best()
    assert (run.progress.best_score, run.progress.best_step) == (3.0, 0)


def test_windows_that_differ_have_other_digests() -> None:
    windows = {"code": torch.arange(8).view(2, 4), "prose": torch.arange(8, 16).view(2, 4)}
    known = windows_digest(windows)
    assert known == windows_digest(dict(reversed(windows.items())))
    others = [
        {"code": windows["code"]},
        {**windows, "code": windows["code"].view(4, 2)},
        {**windows, "code": windows["code"] + 1},
        {"code": windows["prose"], "prose": windows["code"]},
    ]
    assert len({known, *map(windows_digest, others)}) == 5


@pytest.mark.parametrize(("resumed", "stays"), [(0, False), (100, False), (110, True), (120, True)])
def test_a_learned_mask_of_a_later_step_is_put_aside(run: Any, resumed: int, stays: bool) -> None:
    """At the end of this run it would pass for its result."""
    mask, pattern = run.paths.mask("learned"), Pattern(2, 4)
    masks = {"model.layers.0.mlp.up_proj": pattern.best(torch.arange(8.0).view(1, 8))}
    save_masks(mask, masks, "2:4", fingerprint="a", method="learned", evaluation={"step": 110})
    write_seconds(mask, 1.0)
    found: Any = object.__new__(snapshot.Snapshots)
    found.folder = run.paths.learn / "snapshots"
    run.snapshots, run.progress = found, Progress(resumed)
    run.config = SimpleNamespace(learn=SimpleNamespace(steps=130))
    run._put_other_mask_aside()
    assert [mask.exists(), times_path(mask).exists()] == [stays, stays]
    aside = run.paths.learn / "snapshots-before-1"
    assert [path.exists() for path in (aside, aside / mask.name)] == [not stays] * 2
    assert (aside / times_path(mask).name).exists() != stays
    run._put_other_mask_aside()  # twice is once
    run.config.learn.steps = resumed  # nothing is left to learn: the mask stays where it is
    save_masks(mask, masks, "2:4", fingerprint="a", method="learned", evaluation={"step": 110})
    run._put_other_mask_aside()
    assert mask.exists()


@pytest.mark.parametrize("how", ["a signal", "a step", "in the foreground", "a failure", "the end"])
def test_each_snapshot_has_the_whole_time(
    run: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot that is on its way, and the next. A step is the first of its start, whose own
    time is short.
    """
    events: list[Any] = []
    run.watchdog = SimpleNamespace(expect=lambda *given: events.append(given))
    run.mesh.world, run.mesh.barrier = 2, lambda: None
    run.first_step = run.progress.step
    found: Any = object.__new__(snapshot.Snapshots)
    found.folder, found.config, found.mesh = run.paths.learn / "snapshots", run.config, run.mesh
    found.expect, found._state = run._expect_snapshot, dict
    found._note = found._delete_old = lambda *_: None
    found.background = SimpleNamespace(
        proceed=lambda wait=False: events.append("waits") if wait else None,
        start=lambda *_: events.append("writes"),
    )
    monkeypatch.setattr(snapshot, "save_sharded", lambda *_: events.append("writes"))
    run.snapshots = found
    stop = StopRequest()
    if how == "a signal":
        stop.received = "SIGTERM"
        run._leave(stop)
    elif how == "a failure":
        run._step = fail
        with pytest.raises(LearningError):
            run._learn(stop)
    elif how == "the end":
        run._evaluate, run._save_mask = dict, lambda *_: None
        run._finish()
    else:
        found.config = tiny_config({"snapshot": {"background": how == "a step"}})
        found.begin(run.progress)
    limit = ("a snapshot", 60.0 * run.config.parallel.timeout_minutes)
    places = [place for place, event in enumerate(events) if event in ("waits", "writes")]
    assert events[places[-1]] == ("waits" if how == "a failure" else "writes")
    assert "waits" in events and all(events[place - 1] == limit for place in places)


def test_the_first_step_of_a_start_has_a_short_time(run: Any) -> None:
    """A start that resumes has a first step too; a shorter parallel.timeout_minutes counts for it,
    and one process has no limit.
    """
    expected: list[tuple[str, float]] = []
    run.watchdog = SimpleNamespace(expect=lambda *given: expected.append(given))

    def shown(step: int, **parallel: int) -> list[tuple[str, float]]:
        expected.clear()
        run.progress.step = step
        run.config = tiny_config().model_copy(update={"run_dir": run.config.run_dir})
        run.config.parallel.__dict__.update(parallel)
        run._show("learning")
        run._expect_progress()  # as before each micro-batch
        assert expected[:1] == expected[1:]
        return [(what[:40], seconds) for what, seconds in expected[:1]]

    assert shown(7) == []
    run.mesh.world, run.first_step = 2, 7
    first = "progress towards the end of the first step (parallel.first_step_minutes)"[:40]
    assert shown(7, first_step_minutes=3, timeout_minutes=30) == [(first, 180.0)]
    assert shown(7, first_step_minutes=3, timeout_minutes=2) == [(first, 120.0)]
    assert shown(8, first_step_minutes=3, timeout_minutes=30) == [("progress after step 8", 1800.0)]
