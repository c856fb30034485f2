"""The studies with megamask's real verbs, in the test's process: what a stand-in takes for granted,
such as the files that a prior needs, shows here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import studies.child
from megamask import load_masks
from megamask.errors import EXIT_OK
from megamask.storage import read_json
from studies.evidence import __main__, runs
from studies.evidence.chapters import CHAPTERS, MAIN
from studies.learners import __main__ as learners
from tests.e2e.program import RECIPE, command

pytestmark = pytest.mark.slow


@pytest.fixture
def line(
    prepared: Path,
    model: Path,
    settings: Callable[[Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The words of a study on the tiny model; verbs run in this process."""

    def here(
        name: str, recipe: Path, overrides: list[str], run_dir: Path, minutes: float, lock: int
    ) -> None:
        finished = command(name, "--config", str(recipe), *overrides)
        assert finished.code == EXIT_OK, (name, overrides, finished.stderr[-2000:])

    monkeypatch.setattr(runs, "verb", here)
    monkeypatch.setattr(studies.child, "verb", here)
    base = tmp_path / "base"
    base.mkdir()
    for name, target in {"hf": model, "weights": prepared / "weights"}.items():
        (base / name).symlink_to(target)
    (base / "shards").symlink_to(prepared / "shards")
    given = settings(base)
    kept = [word for word in given if not word.startswith(("run_dir=", "model.hf="))]
    return f"--base {base} --out {tmp_path / 'out'} --recipe {RECIPE} --seeds 7".split() + kept


def test_jobs_that_build_on_each_other(line: list[str], tmp_path: Path) -> None:
    jobs = ["learn-6-8-60", "reordered", "recover-lora"]
    assert __main__.main([*line, "--jobs", *jobs]) == EXIT_OK
    known = {one["job"]: one for one in read_json(tmp_path / "out/evidence.json", "")}
    assert {*jobs, MAIN.name, "reordered-model"} <= known.keys()
    # every row that a chapter takes from these jobs is in their results under the row's name
    for chapter in CHAPTERS:
        for row in chapter.lines:
            if row.job.name in known:
                assert row.row in known[row.job.name]["perplexity"], (chapter.name, row.label)
    # the mask that is measured is the one that the job says
    (mask,) = (tmp_path / "out").glob("learn-6-8-60-*/7/masks/learned.safetensors")
    assert str(load_masks(mask).pattern) == "6:8"
    assert load_masks(mask).meta["evaluation"]["step"] == 60
    results = read_json(mask.parents[1] / "results.json", "")
    assert known["learn-6-8-60"]["perplexity"] == results["perplexity"]
    assert results["masks"]["learned"]["sha256"] == load_masks(mask).content_sha256
    assert not list((tmp_path / "out").rglob("snapshots"))
    page = (tmp_path / "out/evidence.md").read_text()
    assert "| lora " in page and "| reordered: learned, 60" in page


def test_an_arm_with_the_defaults_starts_from_the_margins_of_its_prior(
    line: list[str], tmp_path: Path
) -> None:
    budget = ["--steps", "4", "--micro-batch", "2", "--evaluate-tokens", "128"]
    assert learners.main([*line, *budget, "--arms", "scale-1-one"]) == EXIT_OK
    (run,) = (tmp_path / "out/runs").glob("scale-1-one-*/7")
    assert (run / "masks/sparsegpt.margins").exists()
    assert read_json(run / "result.json", "")["steps"] == 4
