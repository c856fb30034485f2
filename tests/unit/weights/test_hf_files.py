"""HF folders: streamed reading and writing, and what is said when files are missing, torn or of
another model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megamask.errors import ArtifactError
from megamask.weights.architecture import read_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.file_layout import file_layout
from megamask.weights.fingerprint import fingerprint_model
from megamask.weights.hf_files import HFReader, open_checked, write_hf
from megamask.weights.mapping import expected_tensors, linear_shapes
from megamask.weights.side_files import check_side_files


def tiny_model(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, tie_word_embeddings=tied, attention_bias=True, **sizes)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    return tmp_path / "hf"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_table_names_every_tensor_of_a_real_llama(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tied)
    model.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    open_checked(tmp_path)
    state = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    assert expected_tensors(arch) == state


@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_write_and_read_back(folder: Path, tmp_path: Path, limit: int) -> None:
    with open_checked(folder) as source:
        write_hf(
            tmp_path / "out",
            ((name, source.tensor(name)) for name in source.names()),
            folder,
            max_shard_bytes=limit,
        )
        with open_checked(tmp_path / "out") as back:
            assert set(back.names()) == set(source.names())
            assert all(
                torch.equal(back.tensor(name), source.tensor(name)) for name in source.names()
            )
            name = "model.layers.0.self_attn.q_proj.weight"
            assert torch.equal(
                back.read(name, slice(3, 7), slice(8, 16)), source.tensor(name)[3:7, 8:16]
            )
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) == 1) == (limit == 10**9) and (tmp_path / "out" / "tokenizer.json").exists()
    assert all(
        os.stat(shard).st_mode & 0o777 == os.stat(tmp_path / "out" / "config.json").st_mode & 0o777
        for shard in shards
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            loaded.state_dict().values(), tiny_model().state_dict().values(), strict=True
        )
    )


def test_views_of_one_tensor_can_be_written(folder: Path, tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(6, 2)
    write_hf(tmp_path / "out", [("a", whole[:3]), ("b", whole[3:]), ("c", whole.t())], folder)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(back["b"], whole[3:]) and torch.equal(back["c"], whole.t())


def test_an_error_while_writing_leaves_the_old_folder(folder: Path, tmp_path: Path) -> None:
    def torn() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(2)
        raise RuntimeError("killed")

    write_hf(tmp_path / "out", [("old", torch.ones(1))], folder)
    with pytest.raises(RuntimeError):
        write_hf(tmp_path / "out", torn(), folder)
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["old"]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), rf"misses tensors: {NORM}"),
        (
            lambda tensors: tensors.update({"model.layers.0.router": torch.zeros(2)}),
            r"unknown tensors: model\.layers\.0\.router",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.zeros(3)}),
            rf"wrongly shaped tensors: {NORM} \(3,\), expected \(32,\)",
        ),
        *(
            (
                lambda tensors, dtype=dtype: tensors.update({NORM: torch.ones(32).to(dtype)}),
                rf"has quantized tensors: {NORM} \({str(dtype)[6:]}\)",
            )
            for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64)
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=message):
        open_checked(folder)


def test_leftovers_of_old_checkpoints_are_accepted(tmp_path: Path) -> None:
    tiny_model(tied=True).save_pretrained(tmp_path)
    key = "lm_head.weight"
    rewrite(
        tmp_path,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        ),
    )
    rewrite(
        tmp_path,
        lambda tensors: tensors.update({key: tensors["model.embed_tokens.weight"].clone()}),
    )
    open_checked(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({key: tensors[key] + 1}))
    with pytest.raises(ArtifactError, match=key):
        open_checked(tmp_path)


def test_missing_and_torn_files_are_named(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: is torn"):
        HFReader(folder)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: is missing"):
        HFReader(folder)


def test_an_index_that_disagrees_is_refused(folder: Path, tmp_path: Path) -> None:
    with open_checked(folder) as source:
        write_hf(
            tmp_path / "out",
            ((name, source.tensor(name)) for name in source.names()),
            folder,
            max_shard_bytes=20_000,
        )
    index = tmp_path / "out" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = next(iter(listed["weight_map"]))
    listed["weight_map"]["ghost"] = listed["weight_map"][first]
    index.write_text(json.dumps(listed))
    with pytest.raises(ArtifactError, match="ghost"):
        HFReader(tmp_path / "out")


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_a_single_file_beside_an_index_is_refused(folder: Path, tmp_path: Path, end: str) -> None:
    """transformers reads the single file, whatever the index says."""
    names = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
    single = folder / names[end]
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if end == "bin":
            torch.save(tensors, path)
        else:
            save_file(tensors, path, metadata={"format": "pt"})

    parts = [sorted(stored)[:5], sorted(stored)[5:]]
    files = {f"part-{number}.{end}": part for number, part in enumerate(parts)}
    for name, part in files.items():
        write(folder / name, {one: stored[one] + 1 for one in part})
    index = folder / f"{single.name}.index.json"
    listed = {one: name for name, part in files.items() for one in part}
    index.write_text(json.dumps({"weight_map": listed}))
    open_checked(folder)
    write(single, stored)
    with pytest.raises(ArtifactError, match=f"two models: {single.name}, .*{index.name}"):
        open_checked(folder)
    with pytest.raises(ArtifactError, match="two models"):
        BaseModel(folder).fingerprints()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(stored, single.name)}))
    open_checked(folder)


def test_fingerprint_does_not_depend_on_where_the_weights_are(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    digest = BaseModel(tmp_path).fingerprints().exact
    assert digest == fingerprint_model(model) == fingerprint_model(model.float())
    assert digest != fingerprint_model(tiny_model(seed=1).to(torch.bfloat16))
    linear = model.get_submodule(next(iter(linear_shapes(read_architecture(tmp_path)))))
    linear.weight.data[0, 0] += 1  # one sampled element is enough
    assert digest != fingerprint_model(model)


def test_side_files_that_link_outside_the_model_are_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private")
    (folder / "LICENSE").symlink_to(secret)
    (folder / "NOTICE.real").write_text("notice")
    (folder / "NOTICE").symlink_to(folder / "NOTICE.real")
    with caplog.at_level("WARNING"):
        write_hf(tmp_path / "out", iter([("a.weight", torch.ones(2, 2))]), folder)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "LICENSE" not in written and "left out" in caplog.text
    assert (tmp_path / "out" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_config_and_tokenizer_that_link_outside_the_model_are_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """A folder without them would be another model, and a copy could publish a private file."""
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text((folder / "config.json").read_text())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    check_side_files(tmp_path / "none")
    said = rf"(?s){name}.* is a link to {elsewhere}.*cp -L"
    with pytest.raises(ArtifactError, match=said):
        check_side_files(folder)
    with pytest.raises(ArtifactError, match=said):
        write_hf(tmp_path / "out", iter([("a.weight", torch.ones(2, 2))]), folder)
    assert not (tmp_path / "out").exists()
    (folder / name).unlink()
    (folder / name).write_text(elsewhere.read_text())
    check_side_files(folder)


def test_side_files_of_a_hub_cache_are_copied(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache of the Hub keeps every file of a snapshot as a link to a blob beside it."""
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text((folder / "config.json").read_text())
    (snapshot / "config.json").symlink_to(blobs / "0123")
    templates = snapshot / "additional_chat_templates"
    templates.mkdir()
    (blobs / "4567").write_text("tool")
    (templates / "tool_use.jinja").symlink_to(blobs / "4567")
    (templates / "other.jinja").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level("WARNING"):
        write_hf(tmp_path / "out", iter([("a.weight", torch.ones(2, 2))]), snapshot)
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out" / templates.name / "tool_use.jinja").read_text() == "tool"
    assert "left out additional_chat_templates/other.jinja" in caplog.text


def test_everything_but_weights_is_copied(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("README.md", "modeling_x.py", "USE_POLICY.md", "chat_template.jinja"):
        (folder / name).write_text(name)
    for name in ("pytorch_model.bin", "model.gguf", ".gitattributes", "other.safetensors"):
        (folder / name).write_text("weights")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (folder / "onnx").mkdir()
    with caplog.at_level("WARNING"):
        write_hf(tmp_path / "out", iter([("a.weight", torch.ones(2, 2))]), folder)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert {"README.md", "modeling_x.py", "USE_POLICY.md", "chat_template.jinja"} <= written
    assert "additional_chat_templates/tool.jinja" in written
    assert not written & {"pytorch_model.bin", "model.gguf", ".gitattributes", "other.safetensors"}
    assert "left out onnx" in caplog.text


def test_files_with_transposed_weights_and_short_names_come_back_as_they_were(
    tmp_path: Path,
) -> None:
    """GPT-2's linears lie as (in, out); its first files leave out a prefix and hold buffers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16, vocab_size=50)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in written.items()}
    (tmp_path / "old").mkdir()
    save_file(old | {"h.0.attn.bias": torch.ones(1)}, tmp_path / "old" / "model.safetensors")
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    layout = file_layout(read_architecture(tmp_path / "new"))
    name = "transformer.h.0.attn.c_attn.weight"
    for folder in (tmp_path / "new", tmp_path / "old"):
        with open_checked(folder) as reader:
            assert reader.shape(name) == (96, 32) and set(written) <= set(reader.names())
            assert torch.equal(reader.tensor(name), written[name].t())
            block = reader.read(name, slice(3, 7), slice(4, 8))
            assert torch.equal(block, written[name].t()[3:7, 4:8])
            tensors = [(one, reader.tensor(one)) for one in written]
        write_hf(tmp_path / "out", tensors, folder, layout=reader.layout)  # its own names
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == (
            written.keys() if folder.name == "new" else old.keys()
        )
        write_hf(tmp_path / "out", tensors, folder, layout=layout)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == written.keys()
        assert all(torch.equal(found[one], written[one]) for one in written)
        assert (
            BaseModel(folder).fingerprints().exact
            == BaseModel(tmp_path / "out").fingerprints().exact
        )
