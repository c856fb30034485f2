"""The verb push against a Hub on this machine, through the real client."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import megamask
from megamask.__main__ import main
from megamask.errors import EXIT_UNAVAILABLE, EXIT_USER_ERROR
from megamask.evaluate.rows import mask_digests
from megamask.masks.file import load_masks
from megamask.weights.base_model import BaseModel
from tests.unit.export.test_masked_folder import save_model
from tests.unit.publish.conftest import push, write_mask, write_results
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


def test_the_base_model_is_not_replaced(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run_dir / "hf", run_dir / "push")
    assert push(run_dir, "--dry-run", f"model.hf={run_dir / 'push'}") == 2
    assert "a folder other than model.hf" in capsys.readouterr().err
    assert not (run_dir / "push" / "megamask_push.json").exists()


def test_who_cannot_push_is_told_first(
    hub: FakeHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, *words: str, code: int = EXIT_USER_ERROR) -> None:
        assert main([*words]) == code
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
    hub.role = "read"
    refused("HF_TOKEN = 'a token that may only read': a token of", "push", "owner/name", run)
    hub.role = "fineGrained"
    (run_dir / "hf" / "away").rename(run_dir / "hf" / "model.safetensors")
    refused(f"{hub.url}/other/name: cannot be written (403", "push", "other/name", run)
    assert not (run_dir / "push").exists()  # a model of hours is not built in vain
    hub.may_write = False
    refused(f"{hub.url}/owner/name: cannot be written (403", "push", "owner/name", run)
    assert hub.repos == {"owner/name": {}}
    hub.may_write = True
    shutil.rmtree(run_dir / "push")
    refused(f"{hub.url}/owner/name: is public", "push", "owner/name", run, "--private")
    assert not (run_dir / "push").exists()
    assert hub.repos == {"owner/name": {}}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    refused("http://127.0.0.1:9: does not take the token or does not answer", "push",
            "owner/name", run, code=EXIT_UNAVAILABLE)  # fmt: skip


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


def pushed_and_exported(run: Path, *words: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of both verbs, without their stamps."""
    assert push(run, "--what", "model", "--dry-run", *words) == 0
    assert main(["export", f"run_dir={run}", *words]) == 0
    folders = (run / "push", run / "export")
    pushed, exported = ({path.name: path.read_bytes() for path in one.iterdir()} for one in folders)
    del pushed["megamask_push.json"], exported["megamask_export.json"]
    return pushed, exported


def test_a_pushed_model_is_the_exported_model(run_dir: Path) -> None:
    """Whatever the base model is, every file of the model has the bytes that export writes."""
    base = run_dir / "hf" / "config.json"
    config = json.loads(base.read_text())
    base.write_text(json.dumps({**config, "sparsity_config": {}}))
    words = ["model.ignore_keys=[sparsity_config]"]
    pushed, exported = pushed_and_exported(run_dir, *words)
    own = {"README.md"}  # a card of the mask in the place of the base model's
    assert {name: pushed[name] for name in exported.keys() - own} == {
        name: content for name, content in exported.items() if name not in own
    }
    assert "sparsity_config" not in json.loads(pushed["config.json"])
    # the folder that Megatron loads says nothing of it either
    there = run_dir / "megatron"
    to_megatron = ["export.format=megatron", f"export.out={there}", "export.mask=dense"]
    assert main(["export", f"run_dir={run_dir}", *words, *to_megatron]) == 0
    assert "sparsity_config" not in json.loads((there / "config.json").read_text())


def test_a_checkpoint_alone_goes_out_with_config_and_licence(run_dir: Path) -> None:
    """A Megatron checkpoint is the whole base model: no Hugging Face folder, no config.json."""
    there = run_dir / "my-checkpoint"
    to_megatron = ["export.format=megatron", f"export.out={there}", "export.mask=dense"]
    assert main(["export", f"run_dir={run_dir}", *to_megatron]) == 0
    licences = {name: (there / name).read_bytes() for name in ("LICENSE", "NOTICE")}
    for path in there.iterdir():  # as Megatron-LM saves it, and licences that a user put there
        if path.is_file() and path.name not in (*licences, "latest_checkpointed_iteration.txt"):
            path.unlink()
    shutil.rmtree(run_dir / "hf")
    write_mask(run_dir, {}, base=BaseModel(run_dir / "hf", there))
    (run_dir / "results.json").unlink()  # of the model before
    words = [f"model.megatron={there}"]
    pushed, exported = pushed_and_exported(run_dir, *words)
    assert {name: pushed[name] for name in exported} == exported
    assert exported.keys() == {"config.json", "model.safetensors", *licences}
    assert json.loads(pushed["config.json"])["hidden_size"] == 32
    assert push(run_dir, "--dry-run", *words) == 0
    archive = ["export.format=patch", f"export.out={run_dir / 'archive'}"]
    assert main(["export", f"run_dir={run_dir}", *words, *archive]) == 0
    for folder in ("push", "archive"):
        assert {name: (run_dir / folder / name).read_bytes() for name in licences} == licences
    card = (run_dir / "push" / "README.md").read_text()
    assert "mask (learned) of my-checkpoint." in card
    assert "`LICENSE`, `NOTICE`" in card
    for name in licences:
        (there / name).unlink()
    assert push(run_dir, "--dry-run", *words) == 0
    assert "held no licence file" in (run_dir / "push" / "README.md").read_text()
