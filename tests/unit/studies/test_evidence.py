"""The study of evidence: what runs and in which order, what is used again, what the tables say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megamask.config import Config, load_config
from megamask.errors import EXIT_OK, EXIT_USER_ERROR
from megamask.storage import read_json, write_json
from studies.child import ArmError
from studies.command import EXIT_SOME_FAILED
from studies.evidence import __main__, runs
from studies.evidence.chapters import ALL_METHODS, CHAPTERS, all_jobs
from studies.evidence.report import mean, number, spread
from tests.unit.studies.stand_ins import REPO, save_mask, save_model

VERSIONS = {"gpu": "absent", "cpu": "some CPU", "torch": "2", "megatron-core": "0"}
RATES = {"magnitude": 90.0, "wanda": 45.0, "sparsegpt": 34.0}
Ran = list[tuple[str, Config, list[str]]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Stand-ins for the verbs that write the same files; the verbs that ran, with their settings
    and words.
    """
    seen: Ran = []

    def stand_in(
        name: str, recipe: Path, overrides: list[str], run_dir: Path, minutes: float, lock: int
    ) -> None:
        given = [word for word in overrides if "=" in word]
        own = [word for word in overrides if "=" not in word]
        config = load_config(recipe, given)
        seen.append((name, config, own))
        masks = run_dir / "masks"
        assert run_dir == Path(config.run_dir) and (run_dir / "hf").is_dir()
        assert (run_dir / "shards" / "prose").is_dir()
        if name == "convert":
            assert (run_dir / "hf" / "of-reorder").exists()
            (run_dir / "weights").mkdir()
        if name == "reorder":
            (Path(own[0])).mkdir()
            (Path(own[0]) / "of-reorder").touch()
        elif name == "prune":
            for method in config.prune.methods:
                save_mask(masks / f"{method}.safetensors", config.pattern, 0, method)
        elif name == "learn":
            for ending in ("safetensors", "margins"):
                prior = config.learn.prior.mask
                assert prior is None or (masks / f"{prior}.{ending}").exists()
            save_mask(masks / "learned.safetensors", config.pattern, config.seed, "learned")
        elif name == "recover":
            assert (masks / "learned.safetensors").exists()
            save_mask(masks / "learned-x.safetensors", config.pattern, 1, config.recover.method)
        elif name == "sensitivity":
            losses = {"layer.0": {"code": 2.5}, "layer.1": {"code": 2.1}}
            made = {"pattern": "2:4", "method": "sparsegpt", "parts": list(losses)}
            write_json(
                run_dir / "sensitivity.json",
                {
                    "made_from": {**made, "by": "layer", "protocol": {"name": "heldout"}},
                    "dense": {"code": 2.0},
                    "loss": losses,
                    "increase": {part: {"code": one["code"] - 2} for part, one in losses.items()},
                    "ranked": list(losses),
                    "kept_dense": ["layer.0"],
                    "keep_dense": 0.5,
                },
            )
        elif name == "evaluate":
            rows: dict[str, Any] = {"dense": {"code": 7.0, "prose": 14.0}}
            for path in masks.glob("*.safetensors"):
                row = path.stem
                if row == "learned-x":
                    row = f"recovered (learned + {given[-1]})"
                value = RATES.get(row, 8.0 + config.seed % 10)
                if config.prune.polish and row in config.prune.methods:
                    row, value = f"{row}, polished", value - 1
                rows[row] = {"code": value, "prose": 2 * value}
            protocol = {"name": "heldout", "window": 512}
            found = {"perplexity": rows, "protocol": protocol, "seconds": {}}
            write_json(run_dir / "results.json", found)

    monkeypatch.setattr(runs, "verb", stand_in)
    monkeypatch.setattr(runs, "versions", lambda: VERSIONS)
    return seen


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    (tmp_path / "base/hf").mkdir(parents=True)
    (tmp_path / "base/shards/prose").mkdir(parents=True)
    save_model(tmp_path / "base")
    return f"--base {tmp_path / 'base'} --out {tmp_path / 'out'} --seeds 1".split()


def test_sources_run_first_and_once(
    ran: Ran, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verbs(*more: str) -> list[str]:
        ran.clear()
        assert __main__.main([*line, *more]) == EXIT_OK
        return [name for name, _, _ in ran]

    one_shot, learning = ["prune", "evaluate"], ["learn", "evaluate"]
    assert verbs("--jobs", "recover-lora") == [*one_shot, *learning, "recover", "evaluate"]
    assert verbs("--jobs", "recover-lora", "learn-2-4-60") == []
    assert verbs("--jobs", "learn-2-4-*") == learning * 2
    # learning depends on the seed, and its prior does not
    assert verbs("--jobs", "learn-2-4-20", "--seeds", "1", "2") == learning
    # another setting is another run; the machine's are not
    assert verbs("--jobs", "learn-2-4-20", "parallel.threads=1") == []
    assert verbs("--jobs", "learn-2-4-20", "calibration.samples=8") == one_shot + learning
    # another protocol of evaluation, and other text of the same name, give other results
    assert verbs("--jobs", "oneshot-2-4", "evaluate.max_tokens=1024") == one_shot
    texts = {"prose": ["a", "b"]}
    monkeypatch.setattr(runs, "text_digests", lambda shards: texts)
    assert verbs("--jobs", "oneshot-2-4") == one_shot
    texts["prose"] = ["a", "c"]
    assert verbs("--jobs", "oneshot-2-4") == one_shot and verbs("--jobs", "oneshot-2-4") == []
    # a rate that megamask derives is not given, and decides all the same
    rate = "learn.sampling.logit_std=0.02"
    assert verbs("--jobs", "learn-2-4-20", rate) == learning
    reordered = ["reorder", "convert", "prune", "learn", "evaluate"]
    assert verbs("--jobs", "reordered") == reordered


def test_a_job_without_perplexity_is_a_report_too(ran: Ran, line: list[str]) -> None:
    assert __main__.main([*line, "--jobs", "reordered-model"]) == EXIT_OK


def test_the_jobs_are_what_they_say(ran: Ran, line: list[str]) -> None:
    jobs = ["learn-4-8-pair-60", "prior-wanda", "schedule-no-prior", "reordered-rotated"]
    more = ["pattern=6:8", "recover.method=lora", "recover.steps=1"]  # those of a job win
    assert __main__.main([*line, *more, "--jobs", *jobs, "recover-blockwise"]) == EXIT_OK
    assert {str(config.pattern) for _, config, _ in ran} == {"4:8:pair", "2:4"}
    learned = [config for name, config, _ in ran if name == "learn"]
    assert [str(config.pattern) for config in learned[:3]] == ["4:8:pair", "2:4", "2:4"]
    assert [config.learn.prior.mask for config in learned[:3]] == ["sparsegpt", "wanda", None]
    assert [config.learn.steps for config in learned[:3]] == [60, 20, 60]
    assert {config.seed for config in learned} == {1}
    (words,) = (own for name, _, own in ran if name == "reorder")
    assert words[1:] == ["--rotate-values"]
    (recover,) = (config.recover for name, config, _ in ran if name == "recover")
    assert (recover.method, recover.steps, recover.global_batch) == ("blockwise", 60, 4)


def test_every_job_fits_the_recipe_and_gives_its_rows() -> None:
    recipe = REPO / "configs" / "recipes" / "quickstart.yaml"
    for job in all_jobs():
        for _, words in job.verbs:
            settings = [word for word in words if "=" in word]
            load_config(recipe, [*job.settings, *settings])
    names = {job.name for job in all_jobs()}
    assert len(names) == len(all_jobs()) and all(
        line.job.name in names for chapter in CHAPTERS for line in chapter.lines
    )
    # one-shot methods that a recipe may ask for are in the table of methods
    methods = Config.model_validate({"prune": {"methods": list(ALL_METHODS)}}).prune.methods
    assert list(methods) == list(ALL_METHODS)


def test_the_report(ran: Ran, line: list[str], tmp_path: Path) -> None:
    jobs = [
        "learn-2-4-20",
        "oneshot-4-8",
        "polish-2-4",
        "sensitivity",
        "parallel.threads=1",
        "prune.damp=0.02",
    ]
    seeds = ["--seeds", "1", "2"]
    assert __main__.main([*line, *seeds, "--jobs", *jobs]) == EXIT_OK
    page = (tmp_path / "out/evidence.md").read_text()
    assert "--seeds 1 2 prune.damp=0.02\n" in page and "some CPU, torch 2, megatron" in page
    # 9 and 10 by seed, prose twice as much; dense 7 / 14: a factor of sqrt(90) / 7
    found = next(row for row in page.splitlines() if row.startswith("| learned, 20 steps"))
    cells = [cell.strip() for cell in found.strip("|").split("|")]
    assert cells[1:] == [
        "9.49 (9.00–10.00)",
        "18.97 (18.00–20.00)",
        "13.42 (12.73–14.14)",
        f"{math.sqrt(90) / 7:.2f}",
        "2",
    ]
    matrix = next(row for row in page.splitlines() if row.startswith("| Wanda "))
    assert [cell.strip() for cell in matrix.strip("|").split("|")] == [
        "Wanda",
        "45.00 / 90.00",
        "45.00 / 90.00",
        "44.00 / 88.00",
    ]
    assert "Not run: 2:4, learned; 4:8, learned; 6:8, SparseGPT mask" in page
    assert "layer.0" in page and (tmp_path / "out/evidence.png").stat().st_size > 10_000
    # A report keeps what an earlier report in its folder knows, while settings and model fit.
    again = ["--report-only", "--report-to", str(tmp_path / "out"), *seeds, "prune.damp=0.02"]
    other = [*line[:2], "--out", str(tmp_path / "empty")]
    assert __main__.main([*other, *again]) == EXIT_OK
    assert (tmp_path / "out/evidence.md").read_text() == page
    known = read_json(tmp_path / "out/evidence.json", "")
    assert [(one["job"], one["seed"]) for one in known] == [
        ("oneshot-2-4", None),
        ("oneshot-4-8", None),
        ("polish-2-4", None),
        ("learn-2-4-20", 1),
        ("learn-2-4-20", 2),
        ("sensitivity", None),
    ]
    assert __main__.main([*other, *again, "calibration.samples=8"]) == EXIT_USER_ERROR


def test_a_job_that_fails_stops_no_other(
    ran: Ran, line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    works: Any = vars(runs)["verb"]

    def fails(name: str, recipe: Path, overrides: list[str], *more: Any) -> None:
        if "learn.steps=60" in overrides:
            raise ArmError("learn was not done")
        works(name, recipe, overrides, *more)

    monkeypatch.setattr(runs, "verb", fails)
    jobs = ["learn-2-4-60", "learn-2-4-20"]
    assert __main__.main([*line, "--jobs", *jobs]) == EXIT_SOME_FAILED
    assert "learn-2-4-60: learn was not done" in capsys.readouterr().err
    assert [name for name, _, _ in ran] == ["prune", "evaluate", "learn", "evaluate"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--jobs", "lear"], "one of oneshot-2-4"),
        (["learn.step=3"], "learn.step"),
        (["--base", "/nowhere"], "hf/ is missing"),
        (["--report-only"], "holds no results"),
        (["evaluate.protocol=wikitext2-2048"], "heldout in a study"),
    ],
)
def test_mistakes(
    more: list[str], message: str, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main([*line, *more]) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_numbers() -> None:
    assert [number(value) for value in (9.876, 1234.5, 2.5e7)] == ["9.88", "1,234", "2.5e+07"]
    assert spread([4.0, 9.0]) == "6.00 (4.00–9.00)"
    assert spread([4.0]) == spread([4.0, 4.001]) == "4.00"
    assert mean({"a": 4.0, "b": 9.0}) == pytest.approx(6.0, rel=1e-12)  # sqrt(4 x 9)
