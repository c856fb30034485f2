"""The study of domains: what runs, from which start, and what the table says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megamask.config import Config, load_config
from megamask.errors import EXIT_OK, EXIT_USER_ERROR
from megamask.storage import read_json, write_json
from studies import given
from studies.domains import __main__, runs
from tests.unit.studies.stand_ins import save_mask, save_model

RECIPE = """
pattern: "2:4"
data:
  domains:
    code: {kind: stdlib}
    prose: {kind: pydocs, heldout: 0.2}
  blend: {code: 0.9, prose: 0.1}
prune: {methods: [sparsegpt]}
"""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    """Stand-ins for the verbs that write the same files; the verbs that ran, with their
    settings.
    """
    seen: list[tuple[str, Config]] = []

    def stand_in(
        name: str, recipe: Path, overrides: list[str], run_dir: Path, minutes: float, lock: int
    ) -> None:
        config = load_config(recipe, overrides)
        seen.append((name, config))
        assert run_dir == Path(config.run_dir) and (run_dir / "weights").is_dir()
        if name == "tokenize":
            for domain in config.data.domains:
                (run_dir / "shards" / domain).mkdir(parents=True, exist_ok=True)
        elif name == "prune":
            save_mask(run_dir / "masks/sparsegpt.safetensors", "2:4", 0, "sparsegpt")
        elif name == "learn":
            assert all((run_dir / "shards" / domain).is_dir() for domain in config.data.domains)
            assert (run_dir / "masks/sparsegpt.safetensors").exists()
            save_mask(run_dir / "masks/learned.safetensors", "2:4", 1, "learned")
        else:
            assert all(Path(mask).exists() for mask in config.evaluate.masks.values())
            (domain,) = config.data.domains
            values = {"dense": 20.0, "sparsegpt": 90.0, "general": 25.0, "scratch": 21.0}
            found = {**values, "transfer": 19.5 if domain == "code" else 20.5}
            rows = {name: {domain: value} for name, value in found.items()}
            write_json(run_dir / "results.json", {"perplexity": rows, "protocol": {"window": 512}})

    monkeypatch.setattr(runs, "verb", stand_in)
    return seen


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    (tmp_path / "base/hf").mkdir(parents=True)
    save_model(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return (
        f"--base {tmp_path / 'base'} --out {tmp_path / 'out'} --recipe {tmp_path / 'recipe.yaml'} "
        "--steps 6 seed=7"
    ).split()


def test_what_runs_and_what_is_used_again(
    ran: list[tuple[str, Config]], line: list[str], tmp_path: Path
) -> None:
    assert __main__.main(line) == EXIT_OK
    names = [name for name, _ in ran]
    assert names == ["tokenize", "prune", "learn", *["learn", "learn", "evaluate"] * 2]
    learned = [config for name, config in ran if name == "learn"]
    assert [config.learn.steps for config in learned] == [12, 6, 6, 6, 6]
    assert {config.seed for config in learned} == {7}
    (general,) = (tmp_path / "out").glob("all-*")
    snapshots = str(general / "learn/snapshots")
    assert [config.learn.prior.mask for config in learned] == [
        "sparsegpt",
        *["sparsegpt", snapshots] * 2,
    ]
    assert [list(config.data.domains) for config in learned] == [
        ["code", "prose"],
        *[["code"]] * 2,
        *[["prose"]] * 2,
    ]
    assert learned[0].data.blend == {"code": 0.9, "prose": 0.1}
    assert learned[3].data.domains["prose"].heldout == 0.2
    before = {config.run_dir for _, config in ran}
    ran.clear()
    assert __main__.main(line) == EXIT_OK
    assert [name for name, _ in ran] == names[:3]  # which find what they made
    for other in ([*line[:-2], "8", line[-1]], [*line, "learn.optimizer.lr=1e-3"]):
        assert (
            __main__.main([*other, "--report-only"]) == EXIT_USER_ERROR
        )  # no row of another study
        ran.clear()
        assert __main__.main(other) == EXIT_OK
        assert [name for name, _ in ran] == names
        here = {config.run_dir for _, config in ran}
        assert not here & before  # a finished run of more steps would pass for this one
        before |= here


@pytest.mark.usefixtures("ran")
def test_the_table(line: list[str], tmp_path: Path) -> None:
    assert __main__.main(line) == EXIT_OK
    rows = [row.split("|")[1:-1] for row in (tmp_path / "out/domains.md").read_text().split("\n")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 7}
    assert cells["code"] == ["20.00", "90.00", "25.00", "21.00", "19.50", "transfer"]
    assert cells["prose"][-2:] == ["20.50", "none"]
    found = read_json(tmp_path / "out/domains.json", "")
    assert [one["steps"] for one in found] == [{"general": 12, "scratch": 6, "transfer": 6}] * 2
    assert __main__.main([*line, "--report-only", "--report-to", str(tmp_path / "to")]) == EXIT_OK
    again = (tmp_path / "to/domains.md").read_text()
    assert again == (tmp_path / "out/domains.md").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"data": {"domains": {"code": {"kind": "stdlib"}}, "blend": {"code": 1.0}}},
            "two or more",
        ),
        ({"prune": {"methods": ["wanda"]}}, "learn.prior.mask = 'sparsegpt'"),
        ({"evaluate": {"protocol": "wikitext2-2048"}}, "heldout in a study"),
        ("weights", "weights/ is missing"),
    ],
    ids=["one domain", "no prior", "protocol", "no weights"],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    ran: list[tuple[str, Config]],
    line: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Any,
    says: str,
) -> None:
    if isinstance(change, str):
        (tmp_path / "base" / change).rename(tmp_path / "elsewhere")
    else:
        recipe = {**yaml.safe_load(RECIPE), **change}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert __main__.main(line) == EXIT_USER_ERROR
    assert says in capsys.readouterr().err and not ran
    assert __main__.main([*line, "--report-only"]) == EXIT_USER_ERROR


def test_a_report_without_results(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([*line, "--report-only"]) == EXIT_USER_ERROR
    assert "no results of a domain" in capsys.readouterr().err


def test_other_text_under_the_same_names_is_measured_anew(
    ran: list[tuple[str, Config]],
    line: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stand_in(folder: Path) -> Any:
        text = (folder / "meta.json").read_text()
        return SimpleNamespace(content_sha256=lambda split: f"{text} {split}")

    monkeypatch.setattr(given, "read_shards", stand_in)
    assert __main__.main(line) == EXIT_OK  # without shards yet
    (general,) = (tmp_path / "out").glob("all-*")
    shards, counts = general / "shards", []
    for text in ("a", "a", "b", "b"):
        for domain in ("code", "prose"):
            (shards / domain).mkdir(parents=True, exist_ok=True)
            (shards / domain / "meta.json").write_text(text if domain == "code" else "same")
        ran.clear()
        assert __main__.main(line) == EXIT_OK
        counts.append([name for name, _ in ran].count("evaluate"))
    # the general mask learned the text of all domains
    assert counts == [2, 0, 2, 0]
