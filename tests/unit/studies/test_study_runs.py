"""The runs of the study: which arms run, and which results are used again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR
from studies import child
from studies.child import ArmError, ElsewhereError, link, locked, verb
from studies.command import EXIT_SOME_FAILED
from studies.learners import __main__
from studies.learners.arms import BASE
from tests.unit.studies.stand_ins import (
    BATCH,
    DENSE,
    RECIPE,
    SEQ,
    STEPS,
    Words,
    results,
)


@pytest.mark.usefixtures("no_report")
def test_an_arm_runs_once_and_other_settings_are_another_run(
    words: Words, verbs: list[str], tmp_path: Path
) -> None:
    def ran(*more: str, **steps: int) -> list[str]:
        verbs.clear()
        assert __main__.main(words(*more, **steps)) == EXIT_OK
        return list(verbs)

    two = ("--arms", "categorical-2of4", BASE)
    # The prior mask is made once.
    assert ran(*two) == ["prune", "learn", "evaluate", "learn", "evaluate"]
    first = results(tmp_path / "out")
    assert [result["settings"]["method"] for result in first] == ["categorical", "subset"]
    assert {result["seed"] for result in first} == {7}
    assert ran(*two) == []
    # These arms have the settings of the base.
    assert ran("--arms", "tau-1", "noise-off") == []
    # Only the second seed is missing.
    assert ran(*two, "--seeds", "7", "8") == ["learn", "evaluate"] * 2
    assert ran("--arms", "tau-2") == ["learn", "evaluate"]
    # These settings do not change what is learned.
    assert ran("--arms", BASE, "parallel.threads=1", "--evaluate-every", "3") == []
    # Another protocol evaluates the same mask again.
    assert ran("--arms", BASE, "--evaluate-tokens", "64") == ["evaluate"]
    assert ran("--arms", BASE, "learn.optimizer.betas=[0.9, 0.99]") == ["learn", "evaluate"]
    assert ran("--arms", BASE, steps=STEPS + 1) == ["learn", "evaluate"]
    # The base run has no mask of this pattern.
    assert ran("--arms", "subset-4of8") == ["prune", "learn", "evaluate"]
    # The results of other arms did not change.
    now = results(tmp_path / "out")
    assert all(result in now for result in first if result["arm"] != BASE)


@pytest.mark.usefixtures("no_report")
def test_what_a_result_holds(words: Words, verbs: list[str], tmp_path: Path) -> None:
    assert __main__.main(words("--arms", BASE)) == EXIT_OK
    (found,) = results(tmp_path / "out")
    assert (
        found["tokens"] == STEPS * BATCH * SEQ
        and found["steps"] == STEPS
        and found["perplexity"]["dense"] == DENSE
    )
    assert found["seconds_per_step"] == 3.0 and found["peak_memory_gib"] == 1.5
    assert [point["step"] for point in found["curve"]] == [0, STEPS // 2, STEPS]
    prior, learned = (
        best_of(seed) for seed in (0, 7)
    )  # plain reference: the kept pairs of every group, counted
    assert found["changed"] == sum(a != b for a, b in zip(prior, learned, strict=True)) / len(prior)
    assert not list((tmp_path / "out").rglob("snapshots"))  # large, and the run is over


def best_of(seed: int) -> list[tuple[int, ...]]:
    scores = (
        torch.rand(4, 32, generator=torch.Generator().manual_seed(seed)).reshape(-1, 4).tolist()
    )
    return [tuple(sorted(sorted(range(4), key=lambda i: -group[i])[:2])) for group in scores]


@pytest.mark.usefixtures("no_report")
def test_a_killed_arm_is_finished_by_the_same_command(
    words: Words, verbs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = child.verb
    dying = ["learn"]

    def dies(name: str, *rest: Any) -> None:
        if name in dying:
            raise KeyboardInterrupt
        usual(name, *rest)

    monkeypatch.setattr(child, "verb", dies)
    command = words("--arms", BASE)
    assert __main__.main(command) == EXIT_INTERRUPTED and verbs == ["prune"]
    dying[:] = ["evaluate"]
    assert __main__.main(command) == EXIT_INTERRUPTED and verbs == ["prune", "learn"]
    dying.clear()
    assert (
        __main__.main(command) == EXIT_OK
        and verbs == ["prune", "learn", "evaluate"]
        and len(results(tmp_path / "out")) == 1
    )


@pytest.mark.usefixtures("no_report")
def test_an_arm_that_fails_lets_the_others_run(
    words: Words,
    verbs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = child.verb

    def fails_for_categorical(name: str, recipe: Path, overrides: list[str], *rest: Any) -> None:
        if "learn.method=categorical" in overrides:
            raise ArmError("no luck")
        usual(name, recipe, overrides, *rest)

    monkeypatch.setattr(child, "verb", fails_for_categorical)
    assert __main__.main(words("--arms", "categorical-2of4", "hard-hard")) == EXIT_SOME_FAILED
    said = capsys.readouterr()
    assert (
        "categorical-2of4, seed 7: no luck" in said.err and "not done: categorical-2of4" in said.err
    )
    assert __main__.main(words("--list")) == EXIT_OK
    done = [line for line in capsys.readouterr().out.splitlines() if "done: 7" in line]
    assert len(done) == 1 and done[0].startswith("hard-hard ")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--arms", "lineer-*"], "one of oneshot-2of4"),
        (["--arms", BASE, "learn.stepz=3"], "Did you mean learn.steps?"),
        (["--tokens-per-step", "100"], "a multiple of a micro-batch, 2 x 32 tokens"),
        (["--base", "no/such/run"], "quickstart.sh"),
        (["--recipe", "no/such.yaml"], "Check the path."),
        (["evaluate.protocol=wikitext2-2048"], "heldout in a study"),
    ],
)
def test_what_cannot_work_is_one_message_before_any_work(
    more: list[str],
    expected: str,
    words: Words,
    verbs: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert __main__.main(words(*more)) == EXIT_USER_ERROR and verbs == []
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and expected in said[0]


def test_the_time_of_a_step_is_measured_apart(
    words: Words, verbs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert __main__.main(words("--arms", BASE, "oneshot-2of4")) == EXIT_OK
    verbs.clear()
    usual = child.verb
    asked: list[str] = []

    def recording(name: str, recipe: Path, overrides: list[str], *rest: Any) -> None:
        asked.extend(overrides)
        usual(name, recipe, overrides, *rest)

    monkeypatch.setattr(child, "verb", recording)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert __main__.main(
        words("--arms", BASE, "oneshot-2of4", "--time", "4")
    ) == EXIT_OK and verbs == ["learn"]
    assert asked[-3:-1] == ["learn.steps=4", "learn.monitor.evaluate_every=0"]
    row = next(
        line
        for line in (tmp_path / "out" / "learners.md").read_text().splitlines()
        if line.startswith("| subset, ")
    )
    assert "3.00" in row.split()  # the stand-in's 3 seconds, not marked as taken beside other work
    assert len(results(tmp_path / "out")) == 1 and not (tmp_path / "out" / "times" / "run").exists()


def test_a_verb_that_outlives_the_script_keeps_its_folder(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
        )
    try:
        with pytest.raises(ElsewhereError, match="another process"), locked(tmp_path):
            pass
    finally:
        child.communicate(b"\n", 60)
    with locked(tmp_path):
        pass


def test_a_verb_that_fails_or_takes_too_long_says_so(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        with pytest.raises(ArmError, match="learn ended with code 2: .*no such setting"):
            verb("learn", RECIPE, ["learn.stepz=1"], tmp_path, 5, lock)
        with pytest.raises(ArmError, match="not done after"):
            verb("learn", RECIPE, [f"run_dir={tmp_path}"], tmp_path, 1e-4, lock)


def test_a_broken_link_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "place").symlink_to(tmp_path / "gone")
    link(tmp_path / "new", tmp_path / "place")
    assert (tmp_path / "place").resolve() == (tmp_path / "new").resolve()


def test_a_link_to_something_else_is_refused(tmp_path: Path) -> None:
    """Results would be told of one model and be those of another."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    link(tmp_path / "one", tmp_path / "place")
    link(tmp_path / "one", tmp_path / "place")
    with pytest.raises(ArmError, match="is of .*one, not of .*other"):
        link(tmp_path / "other", tmp_path / "place")
    assert (tmp_path / "place").resolve() == (tmp_path / "one").resolve()
