"""What ``push`` says of a mask is true of this very mask, and tells nothing of the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamask.__main__ import main
from megamask.config import load_config, run_paths
from megamask.config.published import settings_digest, without_places
from megamask.config.yaml_text import read_yaml
from megamask.evaluate.rows import mask_digests
from megamask.learn.metrics.provenance import write_provenance
from megamask.masks.file import load_masks, save_masks
from megamask.publish.measured import measured
from tests.unit.publish.conftest import push, write_mask, write_results
from tests.unit.publish.fake_hub import TOKEN, FakeHub


def test_settings_of_another_run_are_no_recipe(hub: FakeHub, run_dir: Path) -> None:
    """A run that was started and not finished leaves its settings beside the mask of before."""
    path = run_dir / "learn" / "config.yaml"
    settings = yaml.safe_load(path.read_text())

    def has_recipe() -> bool:
        assert push(run_dir, "--dry-run") == 0
        found = [(run_dir / "push" / name).exists() for name in ("recipe.yaml", "versions.json")]
        card = (run_dir / "push" / "README.md").read_text()
        assert found == 2 * ["setting seed" in card] == 2 * ["no recipe is here" not in card]
        return found[0]

    for change in ({"seed": 5}, {"learn": settings["learn"] | {"steps": 2}}, {"dtype": "bf16"}):
        path.write_text(yaml.safe_dump(settings | change))
        assert not has_recipe(), change
    path.write_text(yaml.safe_dump(settings | {"run_dir": "/elsewhere", "device": "cpu"}))
    assert has_recipe()
    write_mask(run_dir, {"method": "subset"})  # of an older version
    assert not has_recipe()


def test_the_digest_of_settings_is_that_of_the_written_ones(tmp_path: Path) -> None:
    def digest(*words: str) -> str:
        config = load_config(None, [*words])
        write_provenance(tmp_path, config, [])
        found = settings_digest(read_yaml((tmp_path / "config.yaml").read_text()))
        assert found == settings_digest(config.model_dump(mode="json"))
        return found

    text = "data.domains.a={kind: text, path: %s/a.txt}"
    same = digest("run_dir=/a/run", text % "/a", "parallel.tp=2")
    assert digest("run_dir=/b", text % "/b", "learn.optimizer.lr=null") == same
    for other in ("seed=7", "learn.optimizer.lr=1e-5", "pattern=4:8", "learn.prior.mask=wanda"):
        assert digest(text % "/a", other) != same


def test_a_recovered_row_is_no_result_of_the_frozen_mask(hub: FakeHub, run_dir: Path) -> None:
    """The same mask with other weights has the digest of the mask."""
    frozen = load_masks(run_dir / "masks" / "learned.safetensors")
    about = {"method": "reconstruct", "mask": "learned", "weights": "w" * 64}
    made = {"data": {"recovered": about}, "updated_weights": True}
    files: dict[str, Any] = {
        "learned-reconstruct": made,
        "sparsegpt_update": {"updated_weights": True},
    }
    for name, more in files.items():
        save_masks(
            run_dir / "masks" / f"{name}.safetensors",
            frozen,
            frozen.pattern,
            fingerprint=frozen.fingerprint,
            method=name,
            **more,
        )
    masks = {name: load_masks(run_dir / "masks" / f"{name}.safetensors") for name in files}
    masks["learned"] = frozen
    digests = mask_digests(masks)
    assert len({one["sha256"] for one in digests.values()}) == 1
    rows = {"dense": 7.0, "learned": 9.25, "learned-reconstruct": 5.55, "sparsegpt_update": 6.66}
    perplexity = {row: {"code": value} for row, value in rows.items()}
    write_results(run_dir / "results.json", perplexity=perplexity, masks=digests)
    assert push(run_dir, "--dry-run") == 0
    card = (run_dir / "push" / "README.md").read_text()
    assert "9.25" in card and "5.55" not in card and "6.66" not in card and "recovered" not in card
    # Digests without the weights would let both rows through.
    plain = {
        row: {key: one[key] for key in ("sha256", "fingerprint")} for row, one in digests.items()
    }
    write_results(run_dir / "results.json", perplexity=perplexity, masks=plain)
    assert push(run_dir, "--dry-run") == 0
    assert "5.55" in (run_dir / "push" / "README.md").read_text()
    found = measured(run_paths(load_config(None, [f"run_dir={run_dir}"])), frozen, {})
    assert set(found["results.json"]["perplexity"]) == set(rows)


def test_no_path_of_the_machine_is_published(
    hub: FakeHub, run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for text, expected in {
        "sparsegpt, /home/my secret/m.safetensors": "sparsegpt, m.safetensors",
        "file:///secret/a": "a",
        "~/secret/a": "a",
        "1 / 2 and/or https://hub.co/a/b": "1 / 2 and/or https://hub.co/a/b",
        "org/name": "org/name",
    }.items():
        assert without_places([{"a": text}]) == [{"a": expected}]
    texts = {"data": {"eod": "[/INST]"}, "data.domains.x.join": "/", "path": "[/a/b]"}
    assert without_places(texts) == {**texts, "path": "[b]"}
    domain = {"join": {"path": "/secret/a", "join": "/"}}  # a domain called join
    assert without_places(domain) == {"join": {"path": "a", "join": "/"}}
    digests = {settings_digest({"data": {"eod": eod}}) for eod in ("[/INST]", "[INST]")}
    assert len(digests) == 2
    write_mask(run_dir, {"prior": "sparsegpt, /home/secret/m.safetensors"})
    assert push(run_dir, "--dry-run") == 2
    said = capsys.readouterr().err
    assert "data.prior = sparsegpt, /home/secret" in said and "megamask extract" in said
    assert push(run_dir, "--dry-run", "--what", "model") == 0  # the header stays here
    card = (run_dir / "push" / "README.md").read_text()
    assert "sparsegpt, m.safetensors" in card and "secret" not in card
    clean = tmp_path / "clean.safetensors"  # as the message says
    mask = run_dir / "masks" / "learned.safetensors"
    assert main(["extract", str(mask), str(clean), f"run_dir={run_dir}"]) == 0
    assert push(run_dir, "--dry-run", f"export.mask={clean}") == 0
    assert b"secret" not in (run_dir / "push" / "mask.safetensors").read_bytes()


def test_the_size_is_that_of_the_pushed_file(hub: FakeHub, run_dir: Path) -> None:
    write_results(run_dir / "results.json", mask_bytes={"learned": 12345, "wanda": 3})
    assert push(run_dir, "--dry-run") == 0
    found = json.loads((run_dir / "push" / "results.json").read_text())["mask_bytes"]
    assert found == {"learned": (run_dir / "push" / "mask.safetensors").stat().st_size}


def test_files_of_an_older_push_go_and_others_stay(
    hub: FakeHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    old = ("results-c4.json", "tasks.json", "model-00001-of-00002.safetensors",
           "model.safetensors", "model.safetensors.index.json")  # fmt: skip
    kept = ("results-mine.json", "adapter.safetensors", "model-a-of-b.safetensors",
            "old/model.safetensors", "LICENSE.txt")  # fmt: skip
    hub.repos["owner/name"] = files = dict.fromkeys((*old, *kept), b"old")
    hub.private["owner/name"] = False
    assert push(run_dir) == 0  # there is no stamp of a push: the files are the owner's
    assert all(files[name] == b"old" for name in (*old, *kept)) and "recipe.yaml" in files
    (run_dir / "learn" / "config.yaml").unlink()
    assert push(run_dir) == 0
    assert not {*old, "recipe.yaml", "versions.json"} & {*files}
    assert all(files[name] == b"old" for name in kept) and "mask.safetensors" in files
    assert push(run_dir, "--what", "model") == 0
    assert "mask.safetensors" not in files and files["model.safetensors"] != b"old"
    assert len(hub.messages) == 3  # a commit each


def test_a_mask_that_is_replaced_while_it_is_copied_is_refused(
    hub: FakeHub, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copyfile

    def late(source: Path, target: Path) -> None:
        write_mask(run_dir, {"method": "another"})
        copy(source, target)

    def torn(source: Path, target: Path) -> None:
        content = bytearray(source.read_bytes())
        content[-1] ^= 1
        target.write_bytes(content)

    for act, said in ((torn, "is corrupt"), (late, "was replaced while it was copied")):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfile", act)
            assert push(run_dir, "--dry-run") == 2
        assert said in capsys.readouterr().err and not (run_dir / "push").exists()
