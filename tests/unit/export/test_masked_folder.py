"""The verb export: what it writes loads in plain transformers and holds exactly the masked
weights.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import megamask
from megamask.config import Config, build_config
from megamask.errors import ArtifactError, ConfigError, MegamaskError
from megamask.export import folded
from megamask.export.folded import STAMP, read_stamp
from megamask.export.masked_folder import check_export
from megamask.masks.file import load_masks, save_masks
from megamask.masks.identity import identity
from megamask.sparsity.pattern import Pattern
from megamask.verbs.export import run
from megamask.weights import file_stream
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import model_linears
from megamask.weights.source import BITS

P24 = Pattern(2, 4)
Made = tuple[Path, LlamaForCausalLM]


def save_model(folder: Path, seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=tied)).to(
        torch.bfloat16
    )
    model.save_pretrained(folder)
    return model


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A run folder with a model and its learned mask."""
    model = save_model(tmp_path / "hf")
    masks = {name: P24.best(linear.weight.abs()) for name, linear in model_linears(model).items()}
    path = tmp_path / "masks" / "learned.safetensors"
    save_masks(
        path,
        masks,
        P24,
        fingerprint=BaseModel(tmp_path / "hf").fingerprints().exact,
        method="learned",
    )
    return tmp_path, model


def config(folder: Path, pattern: str = "2:4", **export: Any) -> Config:
    return build_config({"run_dir": str(folder), "pattern": pattern, "export": export})


def test_export_equals_apply_masks(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = made
    run(config(folder))
    expected = megamask.apply_masks(model, folder / "masks" / "learned.safetensors").state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(
        torch.equal(loaded[name].view(torch.int16), expected[name].view(torch.int16))
        for name in loaded
    )
    assert (folder / "export" / "config.json").read_text() == (
        folder / "hf" / "config.json"
    ).read_text()
    assert (
        load_file(folder / "export" / "model.safetensors").keys()
        == load_file(folder / "hf" / "model.safetensors").keys()
    )
    assert "verified" in capsys.readouterr().out
    stamp = read_stamp(folder / "export")
    assert stamp.header is not None and stamp.header["method"] == "learned"
    assert stamp.identity == identity(load_masks(folder / "masks" / "learned.safetensors"))
    assert stamp.written == BaseModel(folder / "export").fingerprints().exact
    assert read_stamp(folder / "hf") == (None, None, None)
    run(config(folder))  # its own folder may be written again


@pytest.mark.parametrize("to", ["hf", "megatron"])
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("2:4", "bfloat16"), ("8:16", "float16"), ("4:8:pair", "float32"), ("16:32", "bfloat16")],
)
def test_every_bit_is_that_of_a_plain_fold(
    pattern: str, dtype: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a few rows, read with their mask from a file; signed zeros among the weights."""
    monkeypatch.setattr(file_stream, "BLOCK", 600)
    wanted, own = getattr(torch, dtype), Pattern.parse(pattern)
    model = save_model(tmp_path / "hf").to(wanted)
    masks = {}
    for name, linear in model_linears(model).items():
        linear.weight.data[::3, ::5] = -0.0
        masks[name] = own.best(torch.rand(linear.weight.shape))
    model.config.dtype = wanted
    model.save_pretrained(tmp_path / "hf")
    exact = BaseModel(tmp_path / "hf").fingerprints().exact
    path = tmp_path / "masks" / "learned.safetensors"
    save_masks(path, masks, own, fingerprint=exact, method="learned")
    run(config(tmp_path, pattern, format=to))
    base = BaseModel(tmp_path / "hf", tmp_path / "export-megatron" if to == "megatron" else None)
    applied = megamask.apply_masks(copy.deepcopy(model), path).state_dict()
    with base.open() if to == "megatron" else BaseModel(tmp_path / "export").open() as written:
        for name, tensor in model.state_dict().items():
            mask_OI = masks.get(name.removesuffix(".weight"))
            expected = tensor if mask_OI is None else torch.where(mask_OI, tensor, 0)
            bits = expected.view(BITS[wanted][0])
            assert torch.equal(applied[name].view(BITS[wanted][0]), bits)
            if name != "lm_head.weight":  # tied
                assert torch.equal(written.tensor(name).view(BITS[wanted][0]), bits)


def test_formats_have_folders_of_their_own(made: Made) -> None:
    """One in the place of another deleted the model."""
    folder, _ = made
    for to in ("hf", "maskllm", "patch", "megatron"):
        run(config(folder, format=to))
    assert (folder / "export" / "model.safetensors").exists()
    assert {path.name for path in folder.glob("export-*")} == {
        *("export-maskllm", "export-patch", "export-megatron"),
    }


def test_no_export_says_anything_of_sparsity(made: Made) -> None:
    """vLLM refuses a folder whose config has a ``sparsity_config``, even of dense tensors."""
    folder, _ = made
    for to in ("hf", "maskllm", "patch"):
        run(config(folder, format=to, out=str(folder / f"as-{to}")))
        for path in (folder / f"as-{to}").rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert b"sparsity_config" not in content and b"quantization_config" not in content
    base = folder / "hf" / "config.json"
    base.write_text(json.dumps({**json.loads(base.read_text()), "sparsity_config": {}}))
    with pytest.raises(MegamaskError, match="sparsity_config"):
        run(config(folder))
    ignored = config(folder).model_copy(update={"model": {"ignore_keys": ["sparsity_config"]}})
    run(ignored)
    assert "sparsity_config" not in (folder / "export" / "config.json").read_text()


@pytest.mark.parametrize("is_old", [False, True])
def test_a_users_file_in_an_export_is_kept(made: Made, is_old: bool) -> None:
    folder, _ = made
    (folder / "hf" / "additional_chat_templates").mkdir()
    (folder / "hf" / "additional_chat_templates" / "tool.jinja").write_text("x")
    run(config(folder))
    stamp = folder / "export" / STAMP
    note = json.loads(stamp.read_text())
    assert set(note["files"]) == {
        path.relative_to(folder / "export").as_posix()
        for path in (folder / "export").rglob("*")
        if path.is_file() and path != stamp
    }
    if is_old:  # the stamp of 0.1.0 has no list
        del note["files"]
        time = stamp.stat().st_mtime_ns
        stamp.write_text(json.dumps(note))
        os.utime(stamp, ns=(time, time))
    else:  # a copy may have any times
        os.utime(stamp, ns=(0, 0))
    for name in ("README.md", "logs/a.txt"):
        mine = folder / "export" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("years of work")
        after = stamp.stat().st_mtime_ns + 10**9
        os.utime(mine, ns=(after, after))
        with pytest.raises(ArtifactError, match=rf"did not make.*: {name}\. .*export\.out"):
            run(config(folder))
        mine.unlink()
    run(config(folder))
    assert stamp.exists()


def test_dense_export_changes_nothing(made: Made) -> None:
    folder, _ = made
    run(config(folder, mask="dense"))
    source, written = (load_file(folder / one / "model.safetensors") for one in ("hf", "export"))
    assert source.keys() == written.keys() and all(
        torch.equal(source[name], written[name]) for name in source
    )


def test_missing_megatron_weights_are_named(made: Made) -> None:
    folder, _ = made
    with pytest.raises(ArtifactError, match=r"export\.weights"):
        run(config(folder, weights=str(folder / "none")))


@pytest.mark.parametrize("value", [-0.0, 1.0])
def test_the_check_finds_what_should_not_be_there(made: Made, value: float) -> None:
    folder, _ = made
    run(config(folder))
    masks = load_masks(folder / "masks" / "learned.safetensors")
    check_export(folder / "export", masks)
    name = "model.layers.0.self_attn.o_proj"
    tensors = load_file(folder / "export" / "model.safetensors")
    row, column = (~masks[name]).nonzero()[5]
    tensors[f"{name}.weight"][row, column] = value
    save_file(tensors, folder / "export" / "model.safetensors")
    with pytest.raises(ArtifactError, match="o_proj"):
        check_export(folder / "export", masks)


def test_a_failed_check_leaves_no_folder(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = made
    monkeypatch.setattr(folded, "masked", lambda weight, mask: weight * mask)  # leaves -0.0
    with pytest.raises(ArtifactError, match=r"\+0\.0"):
        run(config(folder))
    assert {path.name for path in folder.iterdir()} == {"hf", "masks"}


def test_what_does_not_fit_is_refused_before_writing(made: Made) -> None:
    folder, _ = made
    with pytest.raises(ArtifactError, match="holds 2:4 masks, wanted 1:4"):
        run(config(folder, pattern="1:4"))
    with pytest.raises(ArtifactError, match=r"none\.safetensors: is missing"):
        run(config(folder, mask=str(folder / "none.safetensors")))
    with pytest.raises(ConfigError, match=r"export\.out"):
        run(config(folder, out=str(folder / "hf")))
    (folder / "mine").mkdir()
    (folder / "mine" / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"did not make.*export\.out"):
        run(config(folder, out=str(folder / "mine")))
    save_model(folder / "hf", seed=1)
    with pytest.raises(ArtifactError, match="another base model"):
        run(config(folder))
    (folder / "hf" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: is missing"):
        run(config(folder))
    assert not (folder / "export").exists()
