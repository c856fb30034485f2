"""benchmarks/learners: which arms run, what is reused, what the report says. Stand-ins take the
place of megamask's verbs here.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import load_config
from megamask.errors import EXIT_OK, EXIT_USER_ERROR
from megamask.masks.file import save_masks
from megamask.sparsity.pattern import Pattern
from megamask.storage import write_json
from studies.learners import __main__, bench, runs
from studies.learners.arms import ARMS, BASE, by_name
from studies.learners.child import ArmError, ElsewhereError, link, locked, verb
from studies.learners.picture import Curve
from studies.learners.report import Row, against

REPO = Path(__file__).resolve().parents[3]
RECIPE = REPO / "configs" / "recipes" / "debug.yaml"
FINGERPRINT = "f" * 64
STEPS, BATCH, SEQ = 6, 4, 32
DENSE = {"code": 7.0, "prose": 13.0}
Words = Callable[..., list[str]]


def save_mask(path: Path, pattern: str, seed: int, method: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = Pattern.parse(pattern)
    scores = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed))
    save_masks(
        path,
        {"model.layers.0.mlp.up_proj": chosen.best(scores)},
        chosen,
        fingerprint=FINGERPRINT,
        method=method,
    )


@pytest.fixture
def words(tmp_path: Path) -> Words:
    """``words(...)``: a command line with more words; the base run has all that the script looks
    at.
    """
    base = tmp_path / "base"
    write_json(base / "weights" / "megamask.json", {"fingerprint": FINGERPRINT})
    (base / "shards" / "prose").mkdir(parents=True)
    save_mask(base / "masks" / "sparsegpt.safetensors", "2:4", 0, "sparsegpt")

    def command(*more: str, steps: int = STEPS) -> list[str]:
        few = [
            "--steps",
            str(steps),
            "--micro-batch",
            "2",
            "--tokens-per-step",
            str(BATCH * SEQ),
            "--evaluate-tokens",
            "128",
        ]
        return [
            "--base",
            str(base),
            "--out",
            str(tmp_path / "out"),
            "--recipe",
            str(RECIPE),
            *few,
            "--seeds",
            "7",
            *more,
        ]

    return command


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Verbs that leave what the real ones leave, and a list of those that ran."""
    ran: list[str] = []

    def stand_in(
        name: str, recipe: Path, overrides: list[str], run_dir: Path, minutes: float, lock: int
    ) -> None:
        ran.append(name)
        config = load_config(recipe, overrides)
        if name == "prune":
            for method in config.prune.methods:
                save_mask(run_dir / "masks" / f"{method}.safetensors", config.pattern, 0, method)
        elif name == "learn":
            assert (
                config.learn.prior.mask is None
                or (run_dir / "masks" / f"{config.learn.prior.mask}.safetensors").exists()
            )
            learn(run_dir, config.learn.steps, config.seed, config.pattern)
        else:
            masks = config.evaluate.masks
            measured = {row: {"code": 11.0, "prose": 22.0 + config.seed} for row in masks}
            assert all(Path(path).exists() for path in masks.values())
            found = {
                "perplexity": {"dense": DENSE, **measured},
                "protocol": {"window": config.evaluate.window},
                "seconds": {},
            }
            write_json(run_dir / "results.json", found)

    monkeypatch.setattr(bench, "verb", stand_in)
    return ran


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time that a picture takes."""
    monkeypatch.setattr(__main__, "write_report", lambda bench, folder: folder)


def learn(run_dir: Path, steps: int, seed: int, pattern: str) -> None:
    records, seconds = [], 0.0
    for step in range(steps + 1):
        known = {"step": step, "tokens": step * BATCH * SEQ}
        if step:
            seconds += 3.0
            records.append({"kind": "train", **known, "seconds": seconds, "memory_gib": 1.5})
        if step in (0, steps // 2, steps):
            seconds += 10.0  # an evaluation comes after its step, and is no part of the next
            records.append(
                {
                    "kind": "evaluation",
                    **known,
                    "seconds": seconds,
                    "perplexity": {"code": 30.0 - step, "prose": 60.0},
                }
            )
    (run_dir / "learn" / "snapshots" / "step-1").mkdir(parents=True)
    (run_dir / "learn" / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    save_mask(run_dir / "masks" / "learned.safetensors", pattern, seed, "learned")


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/*/result.json"))]


@pytest.mark.usefixtures("no_report")
def test_an_arm_runs_once_and_other_settings_are_another_run(
    words: Words, verbs: list[str], tmp_path: Path
) -> None:
    def ran(*more: str, **steps: int) -> list[str]:
        verbs.clear()
        assert __main__.main(words(*more, **steps)) == EXIT_OK
        return list(verbs)

    two = ("--arms", "categorical-2of4", BASE)
    assert ran(*two) == [
        "prune",
        "learn",
        "evaluate",
        "learn",
        "evaluate",
    ]  # the prior is looked at once
    first = results(tmp_path / "out")
    assert [one["settings"]["method"] for one in first] == ["categorical", "subset"] and {
        one["seed"] for one in first
    } == {7}
    assert ran(*two) == []
    assert ran("--arms", "tau-1", "noise-off") == []  # the base's own settings
    assert ran(*two, "--seeds", "7", "8") == ["learn", "evaluate"] * 2  # the second seed
    assert ran("--arms", "tau-2") == ["learn", "evaluate"]
    assert (
        ran("--arms", BASE, "parallel.threads=1", "--evaluate-every", "3") == []
    )  # neither changes what is learned
    assert ran("--arms", BASE, "--evaluate-tokens", "64") == ["evaluate"]  # the mask is there
    assert ran("--arms", BASE, "learn.optimizer.betas=[0.9, 0.99]") == ["learn", "evaluate"]
    assert ran("--arms", BASE, steps=STEPS + 1) == ["learn", "evaluate"]
    assert ran("--arms", "linear-4of8") == [
        "prune",
        "learn",
        "evaluate",
    ]  # no mask of the base has that pattern
    assert all(
        one in results(tmp_path / "out") for one in first if one["arm"] != BASE
    )  # nothing else was touched


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
    usual = runs.verb
    dying = ["learn"]

    def dies(name: str, *rest: Any) -> None:
        if name in dying:
            raise KeyboardInterrupt
        usual(name, *rest)

    monkeypatch.setattr(bench, "verb", dies)
    command = words("--arms", BASE)
    assert __main__.main(command) == __main__.EXIT_INTERRUPTED and verbs == ["prune"]
    dying[:] = ["evaluate"]
    assert __main__.main(command) == __main__.EXIT_INTERRUPTED and verbs == ["prune", "learn"]
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
    usual = runs.verb

    def fails_for_categorical(name: str, recipe: Path, overrides: list[str], *rest: Any) -> None:
        if "learn.method=categorical" in overrides:
            raise ArmError("no luck")
        usual(name, recipe, overrides, *rest)

    monkeypatch.setattr(bench, "verb", fails_for_categorical)
    assert (
        __main__.main(words("--arms", "categorical-2of4", "hard-hard")) == __main__.EXIT_SOME_FAILED
    )
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


def test_the_report(words: Words, verbs: list[str], tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "learners-findings.md").write_text("## Findings\n\nWritten by hand.\n")
    assert (
        __main__.main(words("--arms", BASE, "oneshot-2of4", "tau-2", "--seeds", "7", "8"))
        == EXIT_OK
    )
    verbs.clear()
    assert (
        __main__.main(words("--report-only", "--report-to", str(docs))) == EXIT_OK and verbs == []
    )
    text = (docs / "learners.md").read_text()
    assert "Written by hand." in text and str(tmp_path) not in text
    assert (docs / "learners.png").stat().st_size < 200_000
    # The stand-ins say code 11 and prose 22 + seed: geometric means over seeds, sqrt(29 * 30) =
    # 29.50, and over domains, sqrt(11 * 29.50).
    row = next(line for line in text.splitlines() if line.startswith("| linear, "))
    assert (
        "11.00 (11.00–11.00)" in row
        and "29.50 (29.00–30.00)" in row
        and f"{math.sqrt(11 * 29.50):.2f} (" in row
    )
    assert "reference" in next(
        line for line in text.splitlines() if line.startswith("| 1 to 0.05 ")
    )
    assert f" {STEPS * BATCH * SEQ} " in row and " 2 |" in row
    assert (
        next(line for line in text.splitlines() if line.startswith("| 2 to 0.05 ")).count(
            "tie (+0.0%)"
        )
        == 1
    )
    assert (
        "| SparseGPT mask " in text
        and "Not run: `prior-wanda`, `prior-magnitude`, `prior-none`." in text
    )


def test_the_time_of_a_step_is_measured_apart(
    words: Words, verbs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert __main__.main(words("--arms", BASE, "oneshot-2of4")) == EXIT_OK
    verbs.clear()
    usual = runs.verb
    asked: list[str] = []
    monkeypatch.setattr(
        runs,
        "verb",
        lambda name, recipe, overrides, *rest: (
            asked.extend(overrides),
            usual(name, recipe, overrides, *rest),
        ),
    )
    monkeypatch.setattr(runs.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert __main__.main(
        words("--arms", BASE, "oneshot-2of4", "--time", "4")
    ) == EXIT_OK and verbs == ["learn"]
    assert asked[-3:-1] == ["learn.steps=4", "learn.monitor.evaluate_every=0"]
    row = next(
        line
        for line in (tmp_path / "out" / "learners.md").read_text().splitlines()
        if line.startswith("| linear, ")
    )
    assert "3.00" in row.split()  # the stand-in's 3 seconds, not marked as taken beside other work
    assert len(results(tmp_path / "out")) == 1 and not (tmp_path / "out" / "times" / "run").exists()


@pytest.mark.parametrize(
    ("scores", "reference", "noise", "expected"),
    [
        ([10.3], [10.0], None, "+3.0%"),  # one seed each: nothing is known of the spread
        ([10.3], [10.0], 0.05, "tie (+3.0%)"),  # within the base's spread of 5 %
        ([10.3], [10.0], 0.02, "+3.0%"),
        ([10.3], [9.9, 10.1], None, "+3.0%"),  # the reference's own spread: 2 %
        ([10.0, 10.4], [9.9, 10.1], None, "tie (+2.0%)"),  # 4 % between the arm's seeds
        ([9.5, 9.5], [9.9, 10.1], 0.5, "-5.0%"),  # their own spread counts, not the base's
    ],
)
def test_what_seeds_make_alone_is_a_tie(
    scores: list[float], reference: list[float], noise: float | None, expected: str
) -> None:
    assert against(row_of(scores, "a"), row_of(reference, "b"), noise) == expected


def test_a_curve_is_of_the_steps_that_all_seeds_evaluated() -> None:
    def seed(**perplexity: float) -> dict[str, Any]:
        points = [
            {"step": int(step[1:]), "tokens": 8 * int(step[1:]), "perplexity": {"code": value}}
            for step, value in perplexity.items()
        ]
        return {"curve": points, "peak_memory_gib": 1.0}

    curve = Curve.of(by_name()[BASE], [seed(s0=9, s30=5, s60=4), seed(s0=4, s60=1)], (0.5, False))
    assert (curve.tokens, curve.seconds, curve.score) == ([0, 480], [0, 30], pytest.approx([6, 2]))


def row_of(scores: list[float], digest: str) -> Row:
    return Row(
        "arm",
        "arm",
        [{"code": score, "prose": score} for score in scores],
        [{"digest": digest}] * len(scores),
        {},
    )


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_setting(arm: Any, words: Words) -> None:
    bench = __main__.open_bench(__main__.read_options(words()))
    config = bench.config(arm)
    assert (
        config.pattern == arm.pattern
        and config.data.seq_length == SEQ
        and config.learn.global_batch == BATCH
    )
    assert not arm.learns or config.learn.prior.mask == arm.prior
    assert config.learn.steps == max(1, round(STEPS * arm.share_of_steps))


def test_an_ablation_changes_one_thing(words: Words) -> None:
    """Every ablation holds its reference's own settings as one of its rows, so that the table has
    all values of what is varied.
    """
    bench = __main__.open_bench(__main__.read_options(words()))
    base = bench.digest(by_name()[BASE])
    for group in (
        "prior",
        "kappa",
        "tau",
        "alpha",
        "weight-norm",
        "hard",
        "optimizer",
        "noise",
        "distillation",
        "rate",
        "warmup",
        "eps",
    ):
        same = [arm.name for arm in ARMS if arm.group == group and bench.digest(arm) == base]
        assert len(same) == 1, group


@pytest.mark.parametrize(("steps", "rate"), [(15, 4e-3), (60, 2e-3), (240, 1e-3)])
def test_the_rate_fits_the_steps_and_no_other_setting(
    words: Words, steps: int, rate: float
) -> None:
    bench = __main__.open_bench(__main__.read_options(words(steps=steps)))
    for arm, share in (
        ("linear-2of4", 1),
        ("alpha-1", 1),
        ("distillation-kd-time", 1),
        ("rate-half", 0.5),
        ("optimizer-lion", 0.35),
    ):
        section = bench.config(by_name()[arm]).learn.optimizer
        assert (section.lr, section.min_lr) == pytest.approx((share * rate, share * rate / 10)), arm


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
