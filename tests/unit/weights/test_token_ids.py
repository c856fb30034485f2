"""The ids of special tokens that a derived config.json gets, of both kinds of tokenizer, and of a
tokenizer that cannot be read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megamask.config import load_config
from megamask.storage import read_json
from megamask.weights.base_model import BaseModel, base_model
from megamask.weights.token_ids import token_ids, write_pieces


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A sentencepiece file whose EOS is the token 0, without BOS."""
    text = tmp_path / "text"
    text.write_text("abcd efgh ijkl mnop\n" * 9)
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spm"), vocab_size=24, model_type="char",
        unk_id=1, eos_id=0, bos_id=-1, pad_id=2, minloglevel=2,
    )  # fmt: skip
    return tmp_path / "spm.model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = {"a": 0, "<end>": 1, "<begin>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        bos_token="<begin>",
        eos_token="<end>",
    )
    tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_ids(pieces: Path, folder: Path) -> None:
    written = folder.with_name("written")
    written.mkdir()
    write_pieces(pieces, written)
    assert token_ids(written) == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 2}
    assert token_ids(folder) == {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": None}


def test_the_bos_that_the_settings_ask_for_goes_along(tmp_path: Path) -> None:
    """A sentencepiece file does not say; text and evaluation had a BOS, and the export had none."""
    from sentencepiece import SentencePieceTrainer
    from transformers import AutoTokenizer

    (tmp_path / "text").write_text("the mask keeps two of every four weights\n" * 20)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"), vocab_size=22
    )
    said = {}
    for adds in (True, False):
        out = tmp_path / f"out-{adds}"
        out.mkdir()
        file = tmp_path / "spm.model"
        model = BaseModel(tmp_path / "none", tmp_path / "megatron", tokenizer=file, adds_bos=adds)
        model.__dict__["config"] = {"model_type": "llama"}
        model.complete(out, out.name)
        loaded = AutoTokenizer.from_pretrained(str(out), local_files_only=True)
        assert (loaded("the mask")["input_ids"][0] == loaded.bos_token_id) == adds
        said[adds] = model.side_digests()
    assert said[True] != said[False]
    config = load_config(
        None, [f"model.megatron={tmp_path}", f"data.tokenizer={file}", "data.bos=true"]
    )
    assert base_model(config).adds_bos


def test_a_derived_config_gets_them(
    pieces: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def completed(tokenizer: Path | None) -> dict[str, int | None]:
        out = tmp_path / f"out-{tokenizer.name if tokenizer else 'none'}"
        out.mkdir()
        model = BaseModel(tmp_path / "none", tmp_path / "megatron", tokenizer=tokenizer)
        model.__dict__["config"] = {"model_type": "llama"}  # as derived from the checkpoint
        model.complete(out, out.name)
        written = out / "config.json"
        return read_json(written, "") if written.exists() else {}

    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 2}
    assert completed(pieces) == {"model_type": "llama", **ids}
    assert completed(folder) == {"model_type": "llama", **token_ids(folder)}
    assert "cannot be read" not in caplog.text and "has no tokenizer" not in caplog.text
    torn = tmp_path / "torn.model"
    torn.write_bytes(b"no model")
    assert completed(torn) == {} and "config.json names no BOS and EOS" in caplog.text
    assert completed(None) == {} and "has no tokenizer: set data.tokenizer" in caplog.text
