"""The page that compares runs: small real run folders, read back with an HTML parser."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamask.__main__ import main
from megamask.config import Config, build_config
from megamask.config.published import SETTINGS_SHA256, settings_digest
from megamask.config.yaml_text import write_yaml
from megamask.errors import EXIT_OK, EXIT_USER_ERROR
from megamask.masks.file import load_masks, save_masks
from megamask.report.run_facts import Comparison, RunFacts, names_of, read_runs
from megamask.report.run_pictures import curves_of, samples_figure
from megamask.report.run_tables import (
    perplexity_tables,
    runs_table,
    settings_table,
    tasks_tables,
)
from megamask.sparsity.pattern import Pattern
from tests.unit.report.test_mask_pictures import drawn
from tests.unit.report.test_report import TASKS, Page, page_of, write_metrics
from tests.unit.report.test_result_kinds import DOMAINS

BAD = "<script>alert(1)<$\\frac$>"
PROTOCOL = {
    "name": "heldout",
    "window": 64,
    "dtype": "bf16",
    "tokenizer": "hf",
    "tokenizer_sha256": "t" * 64,
    "text_sha256": "a" * 64,
    "tokens": {"code": 640},
}
VERB_OF = {"results.json": "evaluate", "tasks.json": "tasks"}
LAYERS = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]


def make_run(
    folder: Path,
    seed: int,
    learned: float | None = 9.0,
    protocol: dict[str, Any] | None = None,
    fingerprint: str = "m",
    **settings: Any,
) -> Path:
    """A run folder with metrics, settings, a learned mask and its results."""
    config = build_config({"run_dir": str(folder), "seed": seed, **settings})
    write_metrics(folder, 4)
    written = config.model_dump(mode="json")
    (folder / "learn/config.yaml").write_text(write_yaml(written))
    (folder / "masks").mkdir()
    masks = {name: drawn(seed + number) for number, name in enumerate(LAYERS)}
    file = folder / "masks/learned.safetensors"
    save_masks(
        file,
        masks,
        Pattern(2, 4),
        fingerprint=fingerprint,
        method="learned",
        data={"seq_length": 16, "method": "subset", SETTINGS_SHA256: settings_digest(written)},
    )
    write_results(folder, learned, protocol or PROTOCOL)
    return folder


def write_results(folder: Path, learned: float | None, protocol: dict[str, Any]) -> None:
    masks = load_masks(folder / "masks/learned.safetensors")
    made = {"sha256": masks.content_sha256, "fingerprint": masks.fingerprint}
    rows: dict[str, Any] = {"dense": {"code": 8.0}, "wanda": {"code": 40.0}}
    rows["sparsegpt_update"] = {"code": 11.0}  # has other weights, and is no one-shot mask
    rows["learned"] = {"code": learned}
    results = {"perplexity": rows, "protocol": protocol, "masks": {"learned": made}}
    (folder / "results.json").write_text(json.dumps(results))


def write_tasks(folder: Path, **more: Any) -> None:
    """Results of tasks on the mask that ``results.json`` was measured on."""
    masks = json.loads((folder / "results.json").read_text())["masks"]
    (folder / "tasks.json").write_text(json.dumps({**TASKS, "masks": masks, **more}))


def read(*folders: Path | str, state: str = "finished") -> Comparison:
    return read_runs([str(one) for one in folders], lambda paths: state)


def cells(table: Any) -> dict[str, list[str]]:
    return {name: list(row) for name, row in table.rows}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / name, seed, learned)
        for name, seed, learned in (("a", 1, 9.5), ("b", 2, 9.0), ("c", 3, None))
    ]


def test_runs_of_one_model_and_protocol_share_a_ranking(three: list[Path]) -> None:
    (table,) = perplexity_tables(read(*three).runs)
    assert list(table.header)[:3] == ["run", "rank", "pattern"]
    assert [list(row) for _, row in table.rows] == [
        ["b", "1", "2:4", "8.00", "40.00 Wanda", "9.00", "1.12"],
        ["a", "2", "2:4", "8.00", "40.00 Wanda", "9.50", "1.19"],
        ["c", "–", "2:4", "8.00", "40.00 Wanda", "–", "–"],
    ]


@pytest.mark.parametrize("key", sorted(set(PROTOCOL) - {"tokenizer"}))
@pytest.mark.parametrize("change", ["another", "missing"])
def test_any_other_protocol_is_a_table_of_its_own(tmp_path: Path, key: str, change: str) -> None:
    other = {**PROTOCOL, key: "another"}
    if change == "missing":
        del other[key]
    a = make_run(tmp_path / "a", 1)
    runs = read(a, make_run(tmp_path / "b", 2, protocol=other)).runs
    first, second = perplexity_tables(runs)
    assert [list(cells(one)) for one in (first, second)] == [["a"], ["b"]]
    assert {cells(one)[name][1] for one, name in ((first, "a"), (second, "b"))} == {"1"}
    assert "do not compare" in first.title and "(2 of 2" in second.title
    assert second.notes[0] == f"Other than in the first table: {key.replace('_', ' ')}."


def test_models_of_equal_linears_are_told_apart(tmp_path: Path) -> None:
    """Their norms, embeddings or config.json differ. A run of a version that did not say so
    belongs to the one model that is known.
    """
    runs = [make_run(tmp_path / name, seed) for seed, name in enumerate("abc", start=1)]
    for folder, model in zip(runs[:2], ("one", "other"), strict=True):
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "model_sha256": model}))
    tables = perplexity_tables(read(*runs[:2]).runs)
    assert [list(cells(one)) for one in tables] == [["a"], ["b"]]
    assert tables[1].notes[0] == "Other than in the first table: model."
    assert len(perplexity_tables(read(runs[0], runs[2]).runs)) == 1
    assert len(perplexity_tables(read(*runs).runs)) == 3


def test_models_and_unknown_texts_are_told_apart(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 1)
    b = make_run(tmp_path / "b", 2, fingerprint="another")
    tables = perplexity_tables(read(a, b).runs)
    assert [list(cells(one)) for one in tables] == [["a"], ["b"]]
    assert tables[1].notes[0] == "Other than in the first table: model."
    unknown = {key: value for key, value in PROTOCOL.items() if key != "text_sha256"}
    for folder in (a, b):
        write_results(folder, 9.0, unknown)
    assert len(perplexity_tables(read(a, make_run(tmp_path / "c", 3, protocol=unknown)).runs)) == 2
    names = {**PROTOCOL, "tokenizer": "another", "compared_targets": {"code": 3}}
    write_results(a, 9.0, {**PROTOCOL})
    d = make_run(tmp_path / "d", 4, protocol=names)
    assert len(perplexity_tables(read(a, d).runs)) == 1  # a folder's name changes no number


def test_only_the_settings_that_differ_are_shown(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(folders):
        learn = {"optimizer": {"lr": 0.25 * (1 + number)}}
        make_run(folder, 7, learn=learn, model={"hf": str(folder / "hf")})
    table = settings_table(read(*folders).runs)
    assert list(table.header) == ["key", "one", "two"]
    assert cells(table) == {"learn.optimizer.lr": ["learn.optimizer.lr", "0.25", "0.5"]}
    assert settings_table(read(folders[0]).runs).rows == []


def test_the_table_of_runs_says_what_was_learned(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 7)
    table = runs_table(read(a, state="died at step 4 of 9").runs)
    row = dict(zip(table.header, cells(table)["a"], strict=True))
    assert row["state"] == "died at step 4 of 9" and row["method"] == "subset"
    assert (row["steps"], row["tokens"], row["seed"], row["time"]) == ("4", "256", "7", "4 s")


def test_what_is_no_whole_run_gets_one_line_each(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "notes.json").write_text("{}")
    shutil.copytree(three[1], tmp_path / "torn")
    (tmp_path / "torn/results.json").write_text('{"perplexity": ')
    os.symlink(three[0], tmp_path / "link")
    others = ["empty", "notes.txt", "notes.json", "torn", "absent", "link"]
    found = read(*three, *(tmp_path / name for name in others))
    assert [run.name for run in found.runs] == ["a", "b", "c"]
    assert len(found.said) == len(others)
    for name, why in zip(
        ["link", *others[:-1]],
        ["named twice", "no metrics", "no run folder", "no list of domains", "torn", "missing"],
        strict=True,
    ):
        (line,) = [one for one in found.said if one.startswith(f"{tmp_path / name} ")]
        assert why in line, line
    killed = read(three[0], state="died at step 4 of 9")
    (line,) = killed.said
    assert line.startswith("a is not finished: died at step 4 of 9")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "run", 1) for parent in ("x", "y")]
    found = read(*folders)
    assert [run.name for run in found.runs] == ["x/run", "y/run"]
    (line,) = found.said
    assert "2 folders are called run" in line and "x/run, y/run" in line
    names = names_of([Path("/a/b"), Path("/b"), Path("/c/d"), Path("/")])
    assert list(names.values()) == ["a/b", "b", "d", "/"]


def test_numbers_of_another_mask_are_left_out(tmp_path: Path) -> None:
    """Results stay in the folder when a run learns again."""
    a, b = make_run(tmp_path / "a", 1), make_run(tmp_path / "b", 2)
    shutil.copy(b / "masks/learned.safetensors", a / "masks/learned.safetensors")
    (a / "tasks.json").write_text(
        json.dumps({**TASKS, "masks": {"learned": {"sha256": "of another", "fingerprint": "m"}}})
    )
    found = read(a, b)
    (table,) = perplexity_tables(found.runs)
    assert cells(table)["a"][1] == "–" and cells(table)["b"][1] == "1"
    for file, verb in VERB_OF.items():
        again = f"left out. Run the verb {verb} again."
        assert f"a: learned of {file} was measured on another mask: {again}" in found.said
    assert "a: its learned mask is of other settings than learn/config.yaml." in found.said
    assert not [one for one in found.said if one.startswith("b:")]


def test_numbers_that_do_not_say_their_mask_are_left_out(three: list[Path]) -> None:
    """An older version, and a folder that no export made, note no digests. The mask beside them may
    have been learned since, or have other weights.
    """
    folder, row = three[0], [""]
    results = json.loads((folder / "results.json").read_text())
    whole = results["masks"]["learned"]

    def said(masks: Any) -> list[str]:
        kept = {key: value for key, value in results.items() if key != "masks"}
        more = {} if masks is None else {"masks": masks}
        (folder / "results.json").write_text(json.dumps({**kept, **more}))
        (folder / "tasks.json").write_text(json.dumps({**TASKS, **more}))
        found = read(*three)
        nonlocal row
        (row,) = [cells(one)["a"] for one in perplexity_tables(found.runs) if "a" in cells(one)]
        rows = [name for one in tasks_tables(found.runs) for name in cells(one)]
        assert (row[5] == "–") == bool(found.said)
        assert row[4] == "40.00 Wanda"  # no mask of the run has this name
        dense = ["a: dense"] if row[3] == "8.00" else []
        assert rows == dense + ["a: learned mask"] * (not found.said)
        return found.said

    def sentences(row: str, why: str) -> list[str]:
        again = "left out. Run the verb"
        return [f"a: {row} of {file} {why}: {again} {VERB_OF[file]} again." for file in VERB_OF]

    silent = sentences("learned", "does not say its mask")
    other = sentences("learned", "was measured on another mask")
    assert said({"learned": whole}) == []
    nothing: list[Any] = [None, {}, [], {"learned": None}, {"wanda": whole}, {"learned": {}}]
    for masks in nothing:
        assert said(masks) == silent, masks
    for key in whole:
        assert said({"learned": {one: whole[one] for one in whole if one != key}}) == silent
    assert said({"learned": {**whole, "sha256": "another"}}) == other and row[3] == "8.00"
    dense = sentences("dense", "was measured on another model")
    found = said({"learned": {**whole, "fingerprint": "another"}})
    assert sorted(found) == sorted(other + dense) and row[3] == "–"
    # the same mask over weights that were recovered, or updated with it
    assert said({"learned": {**whole, "weights": "w" * 64}}) == other


def test_tasks_of_one_protocol_share_a_table(three: list[Path]) -> None:
    protocol = {"harness": "0.4.13", "documents_sha256": {"piqa": "1" * 64}}
    for folder, digest in zip(three, "112", strict=True):
        made = {**protocol, "documents_sha256": {"piqa": digest * 64}}
        write_tasks(folder, protocol=made)
    first, second = tasks_tables(read(*three).runs)
    assert list(cells(first)) == ["a: dense", "a: learned mask", "b: dense", "b: learned mask"]
    assert list(cells(second)) == ["c: dense", "c: learned mask"]
    assert second.notes[0] == "Other than in the first table: documents sha256."


def of_model(run: RunFacts, model: str) -> RunFacts:
    """The run on a model with the same linears and other norms."""
    own = replace(run.data.own, model={**run.data.own.model, "model_sha256": model})
    return replace(run, data=replace(run.data, own=own))


def test_curves_share_a_panel_only_on_one_text(three: list[Path]) -> None:
    runs = read(*three).runs
    assert [len(inside) for inside in curves_of(runs).values()] == [1, 1, 1]  # no text is known

    def with_text(run: RunFacts, digest: str) -> RunFacts:
        facts = {name: getattr(run, name) for name in run.__dataclass_fields__}
        return RunFacts(**{**facts, "text": {"english": digest}})

    known = [with_text(run, digest) for run, digest in zip(runs, "xxy", strict=True)]
    panels = curves_of(known)
    assert [[one.run for one in inside] for inside in panels.values()] == [["a", "b"], ["c"]]
    two = [of_model(run, model) for run, model in zip(known, ("1", "2", "1"), strict=True)]
    apart = curves_of(two).values()
    assert [[one.run for one in inside] for inside in apart] == [["a"], ["b"], ["c"]]
    first = next(iter(panels.values()))[0]
    length = Config().data.seq_length
    assert first.samples.tolist() == [2 * 64 / length, 4 * 64 / length]
    assert first.values.tolist() == [45.0, 22.5]
    axes = samples_figure(panels).axes[0]
    assert [np.asarray(line.get_ydata()).tolist() for line in axes.lines] == [[45.0, 22.5]] * 2
    assert len({line.get_color() for line in axes.lines}) == 2


def test_the_page_is_whole_and_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", 1)
    b = make_run(tmp_path / "x" / BAD.replace("/", "-"), 2, learn={"steps": 9})
    bad = {"perplexity": {"dense": {BAD: 3.0}, BAD: {BAD: 4.0}}, "protocol": {BAD: BAD}}
    (b / "results-c4.json").write_text(json.dumps(bad))
    for folder in (a, b):
        write_tasks(folder)
        (folder / "learn/versions.json").write_text(json.dumps({BAD: folder.name}))
    study = tmp_path / "study"
    study.mkdir()
    (study / "domains.json").write_text(json.dumps(DOMAINS))
    out = tmp_path / "new" / "c.html"
    words = ["report", str(a), str(b), str(study), f"--out={out}", str(study / "domains.json")]
    assert main(words) == EXIT_OK
    text = out.read_text()
    page = Page(text)
    assert "http" not in re.sub(r'"data:[^"]*"', "", text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "<script" not in text and text.count("&lt;script&gt;") > 10
    sections = re.findall(r"<h2>(.*?)</h2>", text)
    for title in (
        *("Runs", "Perplexity, heldout", "Perplexity, c4", "Tasks", "Domains: study"),
        *("Domains: domains.json", "Settings that differ", "Consumed samples"),
        *("Learning", "Differences of masks", "Mask files", "Versions and machines"),
    ):
        assert [one for one in sections if one.startswith(title)], title
    assert "Difference by layer" in text  # of two masks
    for shown in ("learn.steps", "bits a weight", "62.50", "scratch", BAD, "Running medians"):
        assert shown in page.text or shown in text, shown
    assert {path.name for path in tmp_path.iterdir()} == {"a", "x", "study", "new"}
    assert {path.name for path in out.parent.iterdir()} == {"c.html"}
    assert str(out) in capsys.readouterr().out


def test_one_folder_has_the_report_of_one_run(
    three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pages = three[0], []
    (folder / "learn/metrics.jsonl").unlink()  # fewer pictures
    (folder / "masks/learned.safetensors").unlink()
    for words in ([f"run_dir={folder}"], [str(folder)]):
        assert main(["report", *words]) == EXIT_OK
        pages.append((folder / "report.html").read_text())
    assert pages[0] == pages[1] and "compared" not in pages[0]
    assert "seed = 1," in page_of(folder).text  # its own settings, where none are given
    assert main(["report", str(folder), "seed=5", "learn.prior.mask=wanda"]) == EXIT_OK
    assert "seed = 1," in page_of(folder).text  # what it learned from, the run alone knows
    assert not (Path.cwd() / "comparison.html").exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{}/a", "--out={}/c.txt"], "--out"),
        (["--out={}/c.html"], "needs run folders"),
        (["{}/a", "{}/b", "--out={}/a/results.json/c.html"], "cannot be written"),
        (["{}/x", "{}/y"], "the given folders: hold no run: "),
        (["{}/absent"], "holds no metrics, results or masks"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    three: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    assert main(["report", *(word.format(three[0].parent) for word in words)]) == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert not list(tmp_path.glob("*.html"))
