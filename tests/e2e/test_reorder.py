"""The verb reorder: another folder, the same function, masks that lose less, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from megamask.verbs.reorder import _is_done as is_done
from megamask.weights.hf_files import HFReader
from tests.e2e.conftest import make_model
from tests.e2e.program import contents, in_process, refusal

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]


def done(verb: str, *words: str) -> str:
    finished = in_process(verb, *words)
    assert finished.code == 0, finished.stderr
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def reordered(
    prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder, and what the verb said."""
    out = tmp_path_factory.mktemp("reordered") / "hf"
    return out, done("reorder", str(out), *settings(prepared))


def test_the_function_stays_and_masks_lose_less(
    reordered: tuple[Path, str], model: Path, prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    out, said = reordered
    shares = json.loads((out / "megamask_reorder.json").read_text())["removed_importance"]
    assert set(shares) == {"hidden", "ffn", "value"}
    assert all(0 < after < before < 0.5 for before, after in shares.values())
    assert all(f"{before:.2%} -> {after:.2%}" in said for before, after in shares.values())
    assert {path.name for path in model.iterdir()} | {"megamask_reorder.json"} == {
        path.name for path in out.iterdir()
    }
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    with HFReader(out) as after, HFReader(model) as before:
        name = "model.layers.0.mlp.down_proj.weight"
        assert not torch.equal(after.tensor(name), before.tensor(name))
    # The rest of the verbs works on the new folder as on any model.
    run_dir = tmp_path / "run"
    shutil.copytree(prepared / "shards", run_dir / "shards")
    words = [*settings(run_dir), f"model.hf={out}", "prune.methods=[wanda]", "dtype=fp32"]
    for verb in ("convert", "prune", "evaluate"):
        done(verb, *words)
    found = json.loads((run_dir / "results.json").read_text())["perplexity"]["dense"]
    (tmp_path / "first").mkdir()
    for name in ("shards", "weights"):
        shutil.copytree(prepared / name, tmp_path / "first" / name)
    done("evaluate", *settings(tmp_path / "first"), "dtype=fp32", "evaluate.masks={}")
    first = json.loads((tmp_path / "first" / "results.json").read_text())["perplexity"]["dense"]
    assert found == pytest.approx(first, rel=1e-5)  # fp32 sums in another order


def test_a_megatron_checkpoint_is_reordered_as_the_folder_of_its_model(
    reordered: tuple[Path, str], model: Path, prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    """Without a config.json, which the arguments of the checkpoint replace."""
    checkpoint, out = tmp_path / "megatron", tmp_path / "hf"
    words = ["export.mask=dense", "export.format=megatron", f"export.out={checkpoint}"]
    done("export", *settings(prepared), *words)
    place = [f"model.megatron={checkpoint}", f"model.hf={tmp_path / 'none'}"]
    # a mask of this model is one of the checkpoint, and of another it is not
    mask = str(prepared / "masks" / "sparsegpt.safetensors")
    words = [f"run_dir={tmp_path}", f"model.megatron={checkpoint}"]
    assert f"belongs to {checkpoint}" in done("inspect", mask, *words)
    other = shutil.copytree(prepared, tmp_path / "other")
    make_model(tmp_path / "another", seed=5)
    words = [f"run_dir={other}", f"model.hf={tmp_path / 'another'}", f"export.out={other / 'ckpt'}"]
    shutil.rmtree(other / "weights")
    done("export", *words, "export.mask=dense", "export.format=megatron")
    message = refusal(in_process("inspect", mask, f"model.megatron={other / 'ckpt'}"))
    assert "another" in message
    # a tokenizer whose special tokens have other ids than LLaMA's, which transformers assumes
    theirs = Path(shutil.copytree(model, tmp_path / "theirs"))
    settings_file = theirs / "tokenizer_config.json"
    words_of = json.loads(settings_file.read_text())
    words_of |= {"bos_token": words_of["eos_token"], "eos_token": words_of["bos_token"]}
    settings_file.write_text(json.dumps(words_of))
    place.append("data.eod=</s>")  # of the prepared text
    done("reorder", str(out), *settings(prepared), *place, f"data.tokenizer={theirs}")
    with HFReader(out) as found, HFReader(reordered[0]) as expected:
        assert set(found.names()) == set(expected.names())
        for name in expected.names():
            assert torch.equal(found.tensor(name), expected.tensor(name)), name
    # the folder has the tokenizer, and its config.json the ids of it, not those of LLaMA
    written = AutoConfig.from_pretrained(str(out))
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 1)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(written, key) == getattr(tokenizer, key), key
    again = ("reorder", str(out), *settings(prepared), *place)
    assert "already holds this model" in done(*again, f"data.tokenizer={theirs}")
    assert "already" not in done(*again, f"data.tokenizer={model}")  # other side files
    assert AutoConfig.from_pretrained(str(out)).eos_token_id == 2


def test_a_folder_is_made_once_and_again_when_settings_change(
    reordered: tuple[Path, str], prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(reordered[0], tmp_path / "hf"))
    before = contents(out)
    assert "already holds this model" in done("reorder", str(out), *settings(prepared))
    assert contents(out) == before
    stamp = json.loads((out / "megamask_reorder.json").read_text())
    broken: object
    for broken in ({**stamp, "files": ["x" * 5000]}, {**stamp, "files": [None]}, [], {}):
        (out / "megamask_reorder.json").write_text(json.dumps(broken))
        assert not is_done(out, stamp["made_from"], ())
    (out / "megamask_reorder.json").write_text(json.dumps(stamp))
    made_from = stamp["made_from"]
    assert is_done(out, made_from, ()) and not is_done(out, {}, ())
    more = {**made_from["side_files"], "chat_template.jinja": "of today"}
    assert not is_done(out, {**made_from, "side_files": more}, ())
    old = {key: stamp[key] for key in stamp if key not in ("side_files", "fingerprint")}
    old["made_from"] = {key: made_from[key] for key in made_from if key != "side_files"}
    for file in ("model.safetensors", "tokenizer.json"):
        whole = (out / file).read_bytes()
        if file == "tokenizer.json":
            (out / file).write_bytes(whole + b" ")
        else:
            tensors = load_file(out / file)
            tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
            save_file(tensors, out / file, metadata={"format": "pt"})
        assert not is_done(out, made_from, ()), file
        (out / "megamask_reorder.json").write_text(json.dumps(old))
        assert is_done(out, made_from, ()), "of an older version, which did not note that much"
        (out / "megamask_reorder.json").write_text(json.dumps(stamp))
        (out / file).write_bytes(whole)
    assert is_done(out, made_from, ())
    done(
        "reorder",
        str(out),
        *settings(prepared),
        "pattern=1:4",
        "model.include=['*.1.mlp.down_proj']",
    )
    stamp = json.loads((out / "megamask_reorder.json").read_text())
    assert stamp["made_from"]["pattern"] == "1:4" and set(stamp["removed_importance"]) == {"ffn"}


def test_rotated_values(
    reordered: tuple[Path, str], prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    """On top of the order, which stays; a folder without rotation is not taken for this."""
    out = Path(shutil.copytree(reordered[0], tmp_path / "hf"))
    done("reorder", str(out), "--rotate-values", *settings(prepared))
    stamp = json.loads((out / "megamask_reorder.json").read_text())
    assert stamp["made_from"]["rotated"] == "values"
    before, after = stamp["removed_importance"]["rotated"]
    assert 0 < after < before
    with HFReader(out) as new, HFReader(reordered[0]) as old:
        changed = {
            name for name in new.names() if not torch.equal(new.tensor(name), old.tensor(name))
        }
    assert changed and all("v_proj" in name or "o_proj" in name for name in changed)


def test_refusals(
    reordered: tuple[Path, str], model: Path, prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    def refused(out: Path, *words: str) -> str:
        return refusal(in_process("reorder", str(out), *settings(prepared), *words))

    free = tmp_path / "free"
    assert "OUT = " in (said := refused(model)) and "a folder other than model.hf" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds files that this verb did not make, and would replace: notes.txt" in refused(
        tmp_path / "mine"
    )
    assert "pattern = '3:7'" in (said := refused(free, "pattern=3:7")) and "head_dim = " in said
    assert "calibration.seq_length" in refused(free, "calibration.seq_length=100000")
    for nothing in ("model.exclude=['*.o_proj']", "pattern=3:6"):  # head_dim is 16
        said = refused(free, "--rotate-values", nothing)
        assert "there is nothing to rotate for" in said and "head_dim = " in said
    assert "is missing" in refused(free, f"model.hf={tmp_path / 'none'}")
    assert "run the verb tokenize" in refused(free, f"run_dir={tmp_path / 'empty'}").lower()
    pruned = tmp_path / "pruned"
    done("export", *settings(prepared), "export.mask=wanda", f"export.out={pruned}")
    said = refused(free, f"model.hf={pruned}")
    assert "holds a model that is pruned already: model.layers.0." in said and str(pruned) in said
    assert not free.exists()
