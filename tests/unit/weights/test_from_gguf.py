"""The verb gguf with a GGUF file written here: a plain folder, made once, never over somebody's
files.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamask.config import Config, build_config
from megamask.errors import ArtifactError, ConfigError
from megamask.verbs.gguf import run
from megamask.weights.from_gguf import STAMP
from megamask.weights.hf_files import open_checked

HIDDEN, FFN, VOCAB = 32, 64, 256


def write_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """A one-layer Llama with a byte-level vocabulary."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(VOCAB)
    tokens = [
        *(
            chr(code)
            for code in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 323)]
        ),
        "ab",
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FFN, HIDDEN),
        "blk.0.ffn_up": (FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    tensors = {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
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
    config = config_for(tmp_path / "m.gguf", tmp_path / "hf")
    run(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    expected = torch.from_numpy(tensors["blk.0.ffn_down.weight"]).to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("ab")["input_ids"]
    open_checked(tmp_path / "hf")
    before = (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns
    run(config)
    assert "already unpacked" in capsys.readouterr().out
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(tmp_path / "m.gguf", seed=1)  # another source: made again
    run(config)
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns != before and (
        tmp_path / "hf" / STAMP
    ).exists()


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
