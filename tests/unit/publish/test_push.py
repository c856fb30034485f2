"""The verb push against a Hub on this machine, through the real client."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import megamask
from megamask.__main__ import main
from megamask.evaluate.rows import mask_digests
from megamask.masks.file import load_masks
from megamask.weights.base_model import BaseModel
from tests.unit.export.test_masked_folder import save_model
from tests.unit.publish.conftest import push, write_results
from tests.unit.publish.fake_hub import TOKEN, FakeHub


def checked_sums(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    summed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert summed == set(files) - {"SHA256SUMS", "megamask_push.json"}


def test_a_mask_is_pushed(
    hub: FakeHub, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(run_dir, "--private", "--base-name", "org/base") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"uploaded: {hub.url}/owner/name/commit/abc" in said
    files, mask = hub.repos["owner/name"], run_dir / "masks" / "learned.safetensors"
    assert hub.private == {"owner/name": True} and "PUT /blob" in hub.calls
    assert files["mask.safetensors"] == mask.read_bytes()
    assert (files["LICENSE"], files["NOTICE"]) == (b"Apache", b"by its makers")
    digest = load_masks(mask).content_sha256
    assert hub.messages == [f"learned 2:4 mask {digest[:12]}"]
    checked_sums(tmp_path / "files", files)
    # only the dense model's row and this mask's, with the protocol
    results = json.loads(files["results.json"])
    assert results["perplexity"] == {"dense": {"code": 7.0}, "learned": {"code": 9.25}}
    assert results["kl"] == {"learned": {"code": 0.5}} and results["protocol"]["text"] == "text.txt"
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["base_model"]) == ("apache-2.0", "org/base")
    for words in ("9.25", "1.32", "window 512", "Protocol heldout", digest, "setting seed", "1234",
                  "77", "`LICENSE`, `NOTICE`", "apache-2.0", "2.13.0", "org/base"):  # fmt: skip
        assert words in card, words
    assert "wanda" not in card.lower()
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert (recipe["seed"], recipe["data"]["domains"]["web"]["path"]) == (1234, "web.txt")
    assert not any(b"secret" in content for content in files.values())
    # again: the same bytes
    assert push(run_dir, "--private", "--base-name", "org/base") == 0
    assert hub.repos["owner/name"] == files and len(hub.messages) == 2


def test_a_model_is_pushed(
    hub: FakeHub, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(run_dir, "--what", "model") == 0
    files = hub.repos["owner/name"]
    checked_sums(tmp_path / "files", files)
    found = load_file(tmp_path / "files" / "model.safetensors")
    masks = load_masks(run_dir / "masks" / "learned.safetensors")
    dense = load_file(run_dir / "hf" / "model.safetensors")
    for name, weight in dense.items():
        mask = masks.get(name.removesuffix(".weight"))
        expected = weight if mask is None else torch.where(mask, weight, torch.zeros_like(weight))
        assert torch.equal(found[name], expected)
    assert files["config.json"] == (run_dir / "hf" / "config.json").read_bytes()
    assert b"# The base model" not in files["README.md"] and b"9.25" in files["README.md"]
    assert "mask.safetensors" not in files  # programs that load every .safetensors would fail
    loaded = tmp_path / "files"
    assert megamask.verify(run_dir / "masks" / "learned.safetensors", run_dir / "hf")
    assert BaseModel(loaded).architecture() == BaseModel(run_dir / "hf").architecture()


def test_a_dry_run_needs_no_token(
    hub: FakeHub, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run_dir, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "nothing was uploaded" in said and "mask.safetensors" in said
    assert not hub.calls and "9.25" in (run_dir / "push" / "README.md").read_text()
    (run_dir / "push" / "mine.txt").write_text("x")
    assert push(run_dir, "--dry-run") == 2
    assert "holds files that this verb did not make" in capsys.readouterr().err


def test_who_cannot_push_is_told_first(
    hub: FakeHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, *words: str) -> None:
        assert main([*words]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if "%|" not in line]  # beside the library's progress
        assert len(errors) == 1 and said in errors[0], errors

    run = f"run_dir={run_dir}"
    (run_dir / "hf" / "model.safetensors").rename(run_dir / "hf" / "away")  # nothing is read yet
    refused("HF_TOKEN = None: a token of the Hugging Face Hub", "push", "owner/name", run)
    refused("REPO = 'name'", "push", "name", run)
    refused("REPO = 'a/b/c'", "push", "a/b/c", run)
    refused("REPO = 'a/b--c'", "push", "a/b--c", run)
    assert not hub.calls
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(f"{hub.url}: does not take the token", "push", "owner/name", run)
    assert hub.calls == ["GET /api/whoami-v2"]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (run_dir / "hf" / "away").rename(run_dir / "hf" / "model.safetensors")
    refused(f"{hub.url}/other/name: cannot be written (403", "push", "other/name", run)
    hub.may_write = False
    refused(f"{hub.url}/owner/name: cannot be written (403", "push", "owner/name", run)
    assert hub.repos == {"owner/name": {}}
    hub.may_write = True
    refused(f"{hub.url}/owner/name: is public", "push", "owner/name", run, "--private")
    assert hub.repos == {"owner/name": {}}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    refused("http://127.0.0.1:9: does not take the token or does not answer", "push",
            "owner/name", run)  # fmt: skip


def test_what_was_not_measured_on_this_mask_is_refused(
    hub: FakeHub, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, *words: str) -> None:
        assert push(run_dir, "--dry-run", *words) == 2
        assert said in capsys.readouterr().err
        assert not (run_dir / "push").exists()

    own = mask_digests({"learned": load_masks(run_dir / "masks" / "learned.safetensors")})
    for key in ("sha256", "fingerprint"):
        write_results(run_dir / "results.json", masks={"learned": own["learned"] | {key: "0" * 64}})
        refused("has a row learned that was measured on another mask")
    write_results(run_dir / "results.json", masks={})
    refused("has a row learned that does not say its mask")
    (run_dir / "results.json").unlink()
    tasks = {"tasks": {"dense": {"piqa": {"acc": 0.7}}, "learned": {"piqa": {"acc": 0.6}}},
             "protocol": {"harness": "0.4.13"}}  # fmt: skip
    (run_dir / "tasks.json").write_text(json.dumps(tasks))
    refused("tasks.json: has a row learned that does not say its mask")
    # with its digest the row is shown; a row of another name that is this very mask is too
    (run_dir / "tasks.json").write_text(json.dumps(tasks | {"masks": own}))
    write_results(
        run_dir / "results-c4.json",
        perplexity={"dense": {"c4": 7.0}, "mine": {"c4": 8.0}, "learned": {"c4": 5.0}},
        masks={"mine": own["learned"], "learned": own["learned"] | {"sha256": "0"}},
    )
    assert push(run_dir, "--dry-run") == 0
    card = (run_dir / "push" / "README.md").read_text()
    assert "60.00" in card and "8.00" in card and "5.00" not in card


def test_what_is_no_mask_of_this_model_is_refused(
    hub: FakeHub, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "export.mask = 'dense': a mask file": ["export.mask=dense"],
        "is missing": ["export.mask=wanda"],
        "pattern": ["pattern=4:8"],
    }
    for said, words in cases.items():
        assert push(run_dir, "--dry-run", *words) == 2
        assert said in capsys.readouterr().err
    save_model(run_dir / "hf", seed=9)
    assert push(run_dir, "--dry-run") == 2
    assert "another" in capsys.readouterr().err and not (run_dir / "push").exists()


def test_an_unmeasured_mask_says_so(hub: FakeHub, run_dir: Path) -> None:
    (run_dir / "results.json").unlink()
    assert push(run_dir, "--dry-run") == 0
    card = (run_dir / "push" / "README.md").read_text()
    assert "Nothing was measured on this mask." in card and "perplexity |" not in card
