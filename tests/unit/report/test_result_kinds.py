"""The kinds of results that a report shows beside perplexities: domains and sensitivity."""

from __future__ import annotations

import ast
import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from megamask.config import build_config
from megamask.errors import ArtifactError
from megamask.report.result_kinds import KINDS, read_result_tables
from megamask.report.sensitivity_table import sensitivity_table
from megamask.verbs.report import run

FACTS = {"pattern": "2:4", "steps": {"general": 4, "scratch": 2}, "tokens_per_step": 1024}
DOMAINS: Any = [
    {
        "domain": domain,
        **FACTS,
        "perplexity": {"dense": 8.0, "scratch": value},
        "protocol": {"window": 64, "tokens": {domain: 640}},
    }
    for domain, value in {"prose": 9.25, "code": 8.0}.items()
]
PARTS = ["model.layers.0.*", "model.layers.1.*"]
SENSITIVITY: Any = {
    "made_from": {
        "pattern": "2:4",
        "method": "wanda",
        "parts": PARTS,
        "protocol": {"window": 64},
    },
    "dense": {"prose": 2.0},
    "loss": {PARTS[0]: {"prose": 2.0625}, PARTS[1]: {"prose": 2.25}},
}
FINISHED: Any = {
    **SENSITIVITY,
    "increase": {PARTS[0]: {"prose": 0.0625}, PARTS[1]: {"prose": 0.25}},
    "ranked": [PARTS[1], PARTS[0]],
    "keep_dense": 0.5,
    "kept_dense": [PARTS[1]],
}
EXPECTED = """\
| pruned alone     |   prose |    mean |  kept |
| ---------------- | ------: | ------: | ----: |
| model.layers.1.* | +0.2500 | +0.2500 | dense |
| model.layers.0.* | +0.0625 | +0.0625 |       |

Increase of the loss in nats a token when this part alone has the 2:4 mask of wanda; dense: prose \
2.0000.

Kept dense under sensitivity.keep_dense=0.5: 'model.exclude_sensitive=["model.layers.1.*"]'

Protocol: window 64"""


def page_of(folder: Path, **files: Any) -> str:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    run(build_config({"run_dir": str(folder)}))
    return (folder / "report.html").read_text()


def test_each_domain_is_a_row_and_keeps_its_protocol(tmp_path: Path) -> None:
    page = page_of(tmp_path, domains=DOMAINS)
    (table,) = read_result_tables(tmp_path)
    assert list(table.header) == ["domain", "dense", "scratch", "at or below dense"]
    assert [list(row) for _, row in table.rows] == [
        ["prose", "8.00", "9.25", "none"],
        ["code", "8.00", "8.00", "scratch"],
    ]
    assert "general 4 / scratch 2, of 1,024 tokens" in page
    assert "Protocol of code: window 64, tokens code 640." in page


def test_the_sensitivity_has_its_table_and_its_picture(tmp_path: Path) -> None:
    assert sensitivity_table(FINISHED) == EXPECTED
    page = page_of(tmp_path, sensitivity=FINISHED)
    shown = page.split("<h2>Sensitivity</h2>")[1].split("<h2>")[0]
    assert shown.index("layers.1.*") < shown.index("layers.0.*")  # the most sensitive first
    assert "Not finished" not in shown and shown.count("data:image/png") == 1
    assert (tmp_path / "pictures/sensitivity.png").exists()
    page = page_of(tmp_path, sensitivity={**SENSITIVITY, "loss": {PARTS[0]: {"prose": 2.5}}})
    assert "+0.5000" in page and "Not finished: 1 of 2 parts" in page
    (tmp_path / "sensitivity.json").unlink()
    assert "Sensitivity" not in page_of(tmp_path, domains=DOMAINS)
    assert not (tmp_path / "pictures/sensitivity.png").exists()  # nothing of an earlier report


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("domains", {}),
        ("domains", []),
        ("domains", [1]),
        ("domains", changed(DOMAINS, (0, "perplexity"), {"dense": 0.0})),
        ("domains", changed(DOMAINS, (0, "perplexity"), {"scratch": 2.0})),
        ("domains", changed(DOMAINS, (1, "steps"), {"general": 8})),  # rows of two studies
        ("domains", changed(DOMAINS, (0, "protocol"), "window 64")),
        ("sensitivity", []),
        ("sensitivity", changed(FINISHED, ("loss", PARTS[0]), {"code": 2.0})),
        ("sensitivity", changed(FINISHED, ("loss", PARTS[0], "prose"), "2.0")),
        ("sensitivity", changed(FINISHED, ("dense",), {})),
        ("sensitivity", changed(FINISHED, ("ranked",), ["another"])),
        ("sensitivity", changed(FINISHED, ("kept_dense",), [1])),
        ("sensitivity", changed(FINISHED, ("keep_dense",), None)),
        ("sensitivity", changed(FINISHED, ("made_from", "protocol"), None)),
    ],
)
def test_broken_files_name_their_verb(tmp_path: Path, name: str, content: Any) -> None:
    with pytest.raises(ArtifactError, match=rf"{name}\.json.*Run (the verb|python -m).* again"):
        page_of(tmp_path, **{name: content})
    assert not (tmp_path / "report.html").exists()


def test_pictures_of_kinds_have_names_of_their_own() -> None:
    names = [name for kind in KINDS for name in kind.pictures]
    others = {"methods", "perplexity", "loss", "mask", "updates", "layers", "samples"}
    assert len({*names, *others}) == len(names) + len(others)


def test_reading_a_kind_draws_nothing() -> None:
    """``push`` reads results too, and needs no matplotlib."""
    for kind in KINDS:
        tree = ast.parse(Path(inspect.getfile(kind.read)).read_text())
        first = [
            ast.unparse(one) for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)
        ]
        assert not [one for one in first if "matplotlib" in one or "plot_style" in one], kind.file
