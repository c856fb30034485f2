"""A domain's mask starts from a general one, and masks of all kinds are compared, extracted,
evaluated and exported by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamask import load_masks
from megamask.config.paths import margins_path
from megamask.evaluate.rows import Rows
from megamask.masks.from_snapshot import load_snapshot
from megamask.weights.architecture import read_architecture
from tests.e2e.program import contents, in_process, refusal

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]
ON_CODE = ("data.blend={prose: 0, code: 1}",)


def evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """Perplexity by domain of every evaluated step."""
    records = map(json.loads, (run_dir / "learn" / "metrics.jsonl").read_text().splitlines())
    return {
        record["step"]: record["perplexity"] for record in records if record["kind"] == "evaluation"
    }


def done(verb: str, *words: str) -> str:
    finished = in_process(verb, *words)
    assert finished.code == 0, finished.stderr
    return finished.stdout


PRIORS = {  # prior, step of the general run, method, whether each weight starts at its margin
    "the learned mask": ("masks/learned.safetensors", 4, "categorical", False),
    "the newest snapshot": ("learn/snapshots", 4, "subset", True),
    "a snapshot": ("learn/snapshots/step-00000002", 2, "categorical", True),
}


@pytest.mark.parametrize("case", PRIORS)
def test_a_domain_mask_starts_at_the_general_one_s_quality(
    run_dir: Path, general: Path, settings: Settings, case: str
) -> None:
    """The same winners under the same windows give the same bits; without noise nothing but the
    prior decides them.
    """
    name, step, method, has_margins = PRIORS[case]
    done(
        "learn",
        *settings(run_dir),
        *ON_CODE,
        f"learn.prior.mask={general / name}",
        f"learn.method={method}",
        f"learn.prior.margins={has_margins}",
    )
    ours, theirs = evaluations(run_dir), evaluations(general)
    assert ours[0] == theirs[step] and ours[0] != theirs[0]
    assert ours[4]["code"] < ours[0]["code"]
    learned, prior = (
        load_masks(folder / "masks" / "learned.safetensors") for folder in (run_dir, general)
    )
    assert any(not torch.equal(learned[linear], prior[linear]) for linear in learned)
    if "snapshot" not in case:
        assert learned.meta["data"]["prior_sha256"] == prior.content_sha256
    said = learned.meta["data"]["prior"]  # masks are published, so no folder of the machine
    file = "learned.safetensors" if "learned" in case else f"step-{step:08d}"
    assert said == f"learned, {file}" and learned.meta["data"]["blend"] == {"code": 1.0}


@pytest.mark.parametrize("snapshot", ["learn/snapshots", "learn/snapshots/step-00000004"])
def test_an_extracted_mask_is_the_learned_one(
    general: Path, settings: Settings, tmp_path: Path, snapshot: str
) -> None:
    out = tmp_path / "extracted.safetensors"
    done("extract", str(general / snapshot), str(out), *settings(tmp_path / "none"))
    extracted, learned = load_masks(out), load_masks(general / "masks" / "learned.safetensors")
    extracted.verify()
    assert set(extracted) == set(learned) and all(
        torch.equal(extracted[name], learned[name]) for name in learned
    )
    assert (extracted.pattern, extracted.fingerprint, extracted.method) == (
        learned.pattern,
        learned.fingerprint,
        "learned",
    )
    assert (
        extracted.meta["data"]["step"] == 4
        and "step-00000004" in extracted.meta["data"]["snapshot"]
    )
    arch = read_architecture(general / "weights")
    theirs = load_snapshot(general / "learn/snapshots/step-00000004", arch).margins()
    ours = extracted.margins()
    assert set(ours) == set(theirs) == set(learned)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(len(ours[name].unique()) > 4 for name in ours)  # no constant
    copied = tmp_path / "copied.safetensors"
    done("extract", str(out), str(copied), *settings(tmp_path / "none"))
    assert margins_path(copied).read_bytes() == margins_path(out).read_bytes()


def test_a_snapshot_that_goes_away_while_others_are_measured(
    general: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that still learns deletes its older snapshots; the dense row is measured first."""
    run_dir = Path(shutil.copytree(general, tmp_path / "run"))
    snapshots, dense = run_dir / "learn" / "snapshots", Rows.dense
    words = [*settings(run_dir), "evaluate.max_tokens=512"]
    done("evaluate", *words, "evaluate.masks={mine: learned}")
    expected = json.loads((run_dir / "results.json").read_text())["perplexity"]["mine"]

    # Beside it another process measures masks of this run, in a folder of its own.
    other = run_dir / "measuring" / "of another process" / "0.safetensors"

    def meanwhile(self: Rows) -> Any:
        shutil.rmtree(snapshots)
        assert [one.name for one in (run_dir / "measuring").glob("*/*")] == ["0.safetensors"]
        other.parent.mkdir()
        other.write_bytes(b"its mask")
        return dense(self)

    monkeypatch.setattr(Rows, "dense", meanwhile)
    done("evaluate", *words, f"evaluate.masks={{mine: {snapshots}}}")
    assert json.loads((run_dir / "results.json").read_text())["perplexity"]["mine"] == expected
    assert list((run_dir / "measuring").glob("*/*")) == [other]
    shutil.rmtree(run_dir / "measuring")
    monkeypatch.undo()
    done("evaluate", *words, "evaluate.masks={mine: learned}")
    assert not (run_dir / "measuring").exists()


def test_a_learned_mask_comes_back_from_a_file_of_another_tool(
    general: Path, model: Path, tmp_path: Path
) -> None:
    learned = load_masks(general / "masks" / "learned.safetensors")
    packed: dict[str, Any] = {
        f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in learned.items()
    }
    np.savez_compressed(tmp_path / "mask_compressed.npz", **packed)
    out = tmp_path / "imported.safetensors"
    words = (str(tmp_path / "mask_compressed.npz"), str(out), "--base", str(model))
    done("import", *words, f"run_dir={tmp_path / 'none'}")
    imported = load_masks(out)
    assert imported.content_sha256 == learned.content_sha256
    assert imported.fingerprint == learned.fingerprint
    said = refusal(in_process("import", *words, f"run_dir={tmp_path / 'none'}"))
    assert "a file that is not there yet" in said


def test_another_learner_s_snapshot_is_extracted_as_its_mask(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "extracted.safetensors"
    done(
        "learn",
        *settings(run_dir),
        "learn.method=maskpro",
        "learn.steps=2",
        "learn.maskpro.initial_logit=1",
    )
    done("extract", str(run_dir / "learn" / "snapshots"), str(out), *settings(run_dir))
    extracted, learned, prior = map(
        load_masks,
        (out, *(run_dir / "masks" / f"{name}.safetensors" for name in ("learned", "sparsegpt"))),
    )
    assert all(torch.equal(extracted[name], learned[name]) for name in learned)
    assert any(not torch.equal(extracted[name], prior[name]) for name in learned)


def test_a_mask_is_evaluated_exported_and_inspected_by_name(
    general: Path, settings: Settings, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(general, tmp_path / "run"))
    newest = run_dir / "learn" / "snapshots"
    done(
        "evaluate",
        *settings(run_dir),
        f"evaluate.masks={{one: learned, other: {newest}, third: wanda}}",
    )
    results = json.loads((run_dir / "results.json").read_text())
    assert (
        results["perplexity"]["one"]
        == results["perplexity"]["other"]
        != results["perplexity"]["third"]
    )
    assert set(results["mask_bytes"]) == {"one", "third"}  # a snapshot is no mask file
    written = {}
    for name in ("learned", str(newest), "wanda"):
        done(
            "export", *settings(run_dir), f"export.mask={name}", f"export.out={tmp_path / 'export'}"
        )
        written[name] = contents(tmp_path / "export")["model.safetensors"]
    assert written["learned"] == written[str(newest)] != written["wanda"]
    said = done("inspect", *settings(run_dir), str(newest))
    assert "2:4 (6 candidates a group)" in said and "step-00000004: valid, belongs to" in said


def test_diff_tells_how_two_masks_differ(general: Path, settings: Settings, tmp_path: Path) -> None:
    out, picture = tmp_path / "diff.json", tmp_path / "pictures" / "diff.png"
    said = done(
        "diff",
        "sparsegpt",
        str(general / "learn" / "snapshots"),
        *settings(general),
        "--json",
        str(out),
        "--picture",
        str(picture),
    )
    found: dict[str, Any] = json.loads(out.read_text())
    prior, learned = (
        load_masks(general / "masks" / f"{name}.safetensors") for name in ("sparsegpt", "learned")
    )
    differ = {name: (prior.index(name) != learned.index(name)) for name in prior}
    assert {name: one["groups_differ"] for name, one in found["linears"].items()} == {
        name: int(one.sum()) / one.numel() for name, one in differ.items()
    }
    assert [found[key]["method"] for key in "ab"] == ["sparsegpt", "learned"]
    for key, groups in (
        ("layers", {"0": "layers.0.", "1": "layers.1."}),
        ("kinds", {"q_proj": "q_proj", "down_proj": "down_proj"}),
    ):
        for name, part in groups.items():
            inside = torch.cat([one.flatten() for linear, one in differ.items() if part in linear])
            assert found[key][name]["groups_differ"] == int(inside.sum()) / inside.numel()
    every = torch.cat([one.flatten() for one in differ.values()])
    assert found["all"]["groups_differ"] == int(every.sum()) / every.numel() > 0
    rows = [line.split("|")[1:3] for line in said.splitlines() if line.startswith("| **all**")]
    assert [cells[1].strip() for cells in rows] == [f"{found['all']['groups_differ']:.2%}", "14"]
    assert "Unrelated masks: groups differ 83.3%, weights differ 50.0%, kept by both 25.0%." in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_diff_of_a_mask_and_its_snapshot_is_none(
    general: Path, settings: Settings, tmp_path: Path
) -> None:
    words = (
        str(general / "masks" / "learned.safetensors"),
        str(general / "learn" / "snapshots"),
        "--json",
        str(tmp_path / "diff.json"),
    )
    said = done(
        "diff", *words, *settings(tmp_path / "none")
    )  # the snapshot's own run tells its architecture
    everything = json.loads((tmp_path / "diff.json").read_text())["all"]
    assert (
        everything["groups_differ"],
        everything["weights_differ"],
        everything["kept_by_both"],
    ) == (0, 0, 0.5)
    assert "step-00000004: learned, 2:4, 14 linears" in said


def test_diff_across_patterns_compares_weights(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    sparser = tmp_path / "sparser"
    for part in ("weights", "shards"):
        shutil.copytree(run_dir / part, sparser / part)
    done(
        "prune",
        *settings(sparser),
        "pattern=1:4",
        "prune.methods=[magnitude]",
        "model.exclude=['*.0.self_attn.o_proj']",
    )
    said = done(
        "diff",
        str(sparser / "masks" / "magnitude.safetensors"),
        "magnitude",
        *settings(run_dir),
        "--json",
        str(tmp_path / "d.json"),
    )
    found = json.loads((tmp_path / "d.json").read_text())
    # By magnitude, what 1:4 keeps 2:4 keeps too, and one weight more in every group.
    assert found["all"]["groups_differ"] is None
    assert (found["all"]["weights_differ"], found["all"]["kept_by_both"]) == (0.25, 0.25)
    assert "1:4 and 2:4 have no groups in common: weights alone are compared." in said
    assert (
        "Only B has masks of 1 linears, which are not compared: model.layers.0.self_attn.o_proj."
        in said
    )


def test_report_compares_with_a_snapshot(run_dir: Path, general: Path, settings: Settings) -> None:
    words = [*settings(run_dir), *ON_CODE, f"learn.prior.mask={general / 'learn' / 'snapshots'}"]
    done("learn", *words)
    done("report", *words)
    assert (run_dir / "pictures" / "layers.png").exists()
