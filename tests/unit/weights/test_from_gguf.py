"""The verb gguf with a GGUF file written here: a plain folder, made once, never over somebody's
files.
"""

from __future__ import annotations

import math
import shutil
import struct
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megamask.config import Config, build_config
from megamask.errors import ArtifactError, ConfigError
from megamask.machine_errors import MemoryShortError
from megamask.storage import read_object, write_json
from megamask.verbs.gguf import run
from megamask.weights import from_gguf, gguf_tokenizer
from megamask.weights.architecture import read_architecture
from megamask.weights.base_model import BaseModel, base_model
from megamask.weights.family import Rope
from megamask.weights.gguf_header import SIZES, Header
from megamask.weights.gguf_layout import GGUF_STAMP
from megamask.weights.hf_files import open_checked
from megamask.weights.model_identity import difference, identity_note

HIDDEN, FFN, VOCAB = 32, 64, 256


def write_gguf(
    path: Path,
    seed: int = 0,
    arch: str = "llama",
    keys: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
    heads: tuple[int, int] = (4, 2),
    context: int = 64,
) -> dict[str, np.ndarray]:
    """A one-layer model with a byte-level vocabulary, and header keys and tensors on top."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_layer_norm_rms_eps(1e-5)
    if "rope.freq_base" not in (keys or {}):
        writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(VOCAB)
    for key, value in (keys or {}).items():
        add: dict[type, Any] = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }
        add[type(value)](f"{arch}.{key}", value)
    tokens = [
        *(
            chr(code)
            for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 323)]
        ),
        "ab",
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if arch.startswith("qwen") else "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    width = (keys or {}).get("attention.key_length", HIDDEN // heads[0])
    q, kv = heads[0] * width, heads[1] * width
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (q, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, q),
        "blk.0.ffn_gate": (FFN, HIDDEN),
        "blk.0.ffn_up": (FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    if arch in ("qwen3", "gemma3"):
        shapes |= {"blk.0.attn_q_norm": (width,), "blk.0.attn_k_norm": (width,)}
    if arch == "gemma3":
        shapes |= {"blk.0.post_attention_norm": (HIDDEN,), "blk.0.post_ffw_norm": (HIDDEN,)}
    tensors = {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    if arch == "qwen2":
        biases = {"attn_q": q, "attn_k": kv, "attn_v": kv}
        tensors |= {
            f"blk.0.{name}.bias": rng.standard_normal(rows).astype(np.float32)
            for name, rows in biases.items()
        }
    tensors |= more or {}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def config_for(path: Path, out: Path) -> Config:
    return build_config({"model": {"gguf": str(path), "hf": str(out)}})


def test_gguf_becomes_a_plain_folder_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "NOTICE").write_text("somebody made this model")
    config = config_for(tmp_path / "m.gguf", tmp_path / "hf")
    run(config)
    assert (tmp_path / "hf" / "NOTICE").read_text() == "somebody made this model"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    expected = torch.from_numpy(tensors["blk.0.ffn_down.weight"]).to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("ab")["input_ids"] == [VOCAB - 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)  # of the header
    open_checked(tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns
    run(config)
    (tmp_path / "hf" / "mine.txt").write_text("years of work")
    run(config)  # nothing would be replaced
    assert capsys.readouterr().out.count("already unpacked") == 2
    (tmp_path / "hf" / "mine.txt").unlink()
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(tmp_path / "m.gguf", seed=1)
    (tmp_path / "hf" / "mine.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"did not make.*: mine\.txt\. .*model\.hf"):
        run(config)
    (tmp_path / "hf" / "mine.txt").unlink()
    run(config)  # another source: made again
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns != before and (
        tmp_path / "hf" / GGUF_STAMP
    ).exists()


def test_a_folder_from_another_file_is_not_the_base_model(tmp_path: Path) -> None:
    own, other, hf = tmp_path / "m.gguf", tmp_path / "other.gguf", tmp_path / "hf"
    write_gguf(own)
    run(config_for(own, hf))

    def note_of(path: Path) -> dict[str, Any]:
        base = base_model(config_for(path, hf))
        with base.open() as source:
            return identity_note(base, source)

    note = note_of(own)
    for is_there in (False, True):
        if is_there:
            write_gguf(other, seed=1)
        base = base_model(config_for(other, hf))
        for check in (base.open, base.fingerprints, partial(difference, note, base)):
            with pytest.raises(ConfigError, match=r"unpacked from another file \(m\.gguf\).*gguf"):
                check()
    shutil.copy(own, other)  # the content decides
    assert note_of(other)["fingerprint"] == note["fingerprint"]
    own.unlink()  # it was unpacked, and is needed no longer
    assert difference(note, base_model(config_for(own, hf))) == ""
    assert difference(note, BaseModel(hf)) == ""


def test_somebodys_folder_is_not_replaced(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"did not make.*model\.hf"):
        run(config_for(tmp_path / "m.gguf", tmp_path / "hf"))
    assert (tmp_path / "hf" / "thesis.tex").exists()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        run(build_config({"model": {"hf": str(tmp_path / "hf")}}))
    with pytest.raises(ArtifactError, match=r"none\.gguf: is missing"):
        run(config_for(tmp_path / "none.gguf", tmp_path / "hf"))
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html><html>log in</html>")
    with pytest.raises(ArtifactError, match=r"page\.gguf: is not a GGUF file: it is an HTML page"):
        run(config_for(tmp_path / "page.gguf", tmp_path / "hf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ArtifactError, match=r"bad\.gguf"):
        run(config_for(tmp_path / "bad.gguf", tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


# transformers reads no head width of Qwen3 and takes 128
QWEN3 = {"attention.key_length": 128, "attention.value_length": 128}
GEMMA3 = {
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.sliding_window": 8,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 8.0,
}


@pytest.mark.parametrize(
    ("arch", "keys"),
    [("llama", {}), ("qwen2", {}), ("qwen3", QWEN3), ("gemma3", GEMMA3)],
    ids=["llama", "qwen2", "qwen3", "gemma3"],
)
def test_every_tensor_is_that_of_transformers(
    tmp_path: Path, arch: str, keys: dict[str, Any]
) -> None:
    write_gguf(tmp_path / "m.gguf", arch=arch, keys=keys)
    run(config_for(tmp_path / "m.gguf", tmp_path / "hf"))
    open_checked(tmp_path / "hf")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name
    read = read_architecture(tmp_path / "hf")
    if arch == "gemma3":  # what transformers leaves out
        assert read.ropes == (Rope(5000.0, {"type": "linear", "factor": 8.0}), Rope(10000.0))
        assert read.layers[0].window == 8 and read.attention_scale == 16**-0.5
    else:
        assert read.ropes == (Rope(5000.0),)


def llama3_divisors(factor: float, width: int = 8, theta: float = 5e5) -> np.ndarray:
    """The tensor that llama.cpp makes of Llama 3.1's scaling, written as its converter does it."""
    divisors = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (index / width)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_a_rope_scaling_is_kept(tmp_path: Path) -> None:
    """Each was dropped once, so that every position beyond the first got wrong angles."""
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "linear.gguf", keys=linear)
    run(config_for(tmp_path / "linear.gguf", tmp_path / "linear"))
    found = read_architecture(tmp_path / "linear").ropes
    assert found == (Rope(5000.0, {"type": "linear", "factor": 4.0}),)
    for factor in (8.0, 32.0):
        path, out = tmp_path / f"{factor}.gguf", tmp_path / f"{factor}"
        divisors = {"rope_freqs.weight": llama3_divisors(factor)}
        write_gguf(path, keys={"rope.freq_base": 5e5}, more=divisors)
        run(config_for(path, out))
        scaling = {"type": "llama3", "factor": factor, "low_freq_factor": 1.0}
        scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        assert read_architecture(out).ropes == (Rope(5e5, scaling),)
        config = AutoConfig.from_pretrained(out)
        assert config.rope_parameters["factor"] == factor
        assert config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, r"rope\.scaling\.type"),
        ({"attention.sliding_window": 32}, {}, r"attention\.sliding_window"),
        ({"attention.scale": 0.3}, {}, r"attention\.scale = 0\.3"),
        ({"logit_scale": 2.0}, {}, r"logit_scale"),
        ({"expert_count": 8}, {}, r"expert_count = 8"),
        ({"attention.value_length": 4}, {}, r"has attention\.value_length = 4: 8 is built"),
        (
            {"attention.key_length": 8, "rope.dimension_count": 4},
            {},
            r"has rope\.dimension_count = 4: 8 is built",
        ),
        ({}, {"rope_freqs.weight": np.array([1, 1, 2, 3], np.float32)}, r"rope_freqs\.weight"),
        ({}, {"blk.0.ffn_gate_exps.weight": np.zeros((8, 32), np.float32)}, r"ffn_gate_exps"),
        ({}, {"blk.0.attn_q.bias": np.zeros(32, np.float32)}, r"misses blk\.0\.attn_k\.bias"),
        ({"feed_forward_length": 48}, {}, r"ffn_gate\.weight has the shape \(64, 32\)"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], more: dict[str, np.ndarray], message: str
) -> None:
    length = keys.get("feed_forward_length")
    write_gguf(tmp_path / "m.gguf", keys={} if length else keys, more=more)
    if length:  # the header says another width than the tensors have
        raw = (tmp_path / "m.gguf").read_bytes()
        name = b"llama.feed_forward_length" + struct.pack("<I", 4)
        place = raw.index(name) + len(name)
        (tmp_path / "m.gguf").write_bytes(raw[:place] + struct.pack("<I", 48) + raw[place + 4 :])
    with pytest.raises(ArtifactError, match=message):
        run(config_for(tmp_path / "m.gguf", tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_named_as_the_header_names_it(name: str) -> None:
    fields = {f"llama.{size}": 8 for size in SIZES if size != name}
    for value in (None, 0, "8"):
        wrong = fields | ({} if value is None else {f"llama.{name}": value})
        header = Header({"general.architecture": "llama", **wrong}, Path("m.gguf"))
        with pytest.raises(ArtifactError) as caught:
            header.config(256, True, None)
        message = f"has {name} = {value!r}: a positive whole number is needed"
        assert caught.value.problem == message


def test_biases_of_a_llama_are_read(tmp_path: Path) -> None:
    shapes = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
    biases = {f"blk.0.{name}.bias": np.full(rows, 0.5) for name, rows in shapes.items()}
    more = {name: bias.astype(np.float32) for name, bias in biases.items()}
    write_gguf(tmp_path / "m.gguf", more=more)
    run(config_for(tmp_path / "m.gguf", tmp_path / "hf"))
    arch = read_architecture(tmp_path / "hf")
    assert arch.attention_bias and arch.attention_out_bias and not arch.mlp_bias


def test_another_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", arch="mamba")
    with pytest.raises(ArtifactError, match="holds a mamba model"):
        run(config_for(tmp_path / "m.gguf", tmp_path / "hf"))
    writer = gguf.GGUFWriter(tmp_path / "lists.gguf", "lfm2")  # a size for each of its layers
    writer.add_head_count_kv([0, 8])
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    with pytest.raises(ArtifactError, match="holds a lfm2 model"):
        run(config_for(tmp_path / "lists.gguf", tmp_path / "hf"))


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_model_is_called_so(tmp_path: Path, number: int) -> None:
    """The first part has the sizes of the whole model, and the others have no sizes. A part was
    called torn, and was hashed before.
    """
    path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if number:
        writer.kv_data[0].pop("general.architecture")
    else:
        writer.add_block_count(2)
        writer.add_embedding_length(HIDDEN)
        writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.add_tensor(f"blk.{number}.attn_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = rf"is part {number + 1} of the 2 parts of a GGUF file\. Merge the parts .*--merge"
    with pytest.raises(ArtifactError, match=said):
        run(config_for(path, tmp_path / "hf"))


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "torn"])
def test_a_folder_that_lost_a_file_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    """Its stamp stays, so it was called unpacked ever after."""
    write_gguf(tmp_path / "m.gguf")
    config = config_for(tmp_path / "m.gguf", tmp_path / "hf")
    run(config)
    file = tmp_path / "hf" / (lost if lost != "torn" else "model.safetensors")
    made = file.read_bytes()
    if lost == "torn":
        file.write_bytes(made[: len(made) // 2])
    else:
        file.unlink()
    capsys.readouterr()
    run(config)
    assert "already unpacked" not in capsys.readouterr().out
    assert file.read_bytes() == made


def test_a_folder_with_the_tokenizer_of_an_older_version_is_made_again(tmp_path: Path) -> None:
    """Its special tokens were those that the installed transformers read."""
    write_gguf(tmp_path / "m.gguf")
    config = config_for(tmp_path / "m.gguf", tmp_path / "hf")
    run(config)
    stamp = read_object(tmp_path / "hf" / GGUF_STAMP, "", {})
    made = (tmp_path / "hf" / "tokenizer_config.json").read_bytes()
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    del stamp["tokenizer"]
    write_json(tmp_path / "hf" / GGUF_STAMP, stamp)
    run(config)
    assert (tmp_path / "hf" / "tokenizer_config.json").read_bytes() == made


@pytest.mark.parametrize(
    "reader",
    [
        f"{from_gguf.__name__}.GGUFReader",
        f"{gguf_tokenizer.__name__}.AutoTokenizer.from_pretrained",
        f"{gguf_tokenizer.__name__}.Tokenizer.from_str",
    ],
)
def test_a_machine_that_is_short_of_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    write_gguf(tmp_path / "m.gguf")

    def fails(*words: Any, **more: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(reader, fails)
    with pytest.raises(MemoryShortError, match="memory does not hold"):
        from_gguf.unpack(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
