"""Both kinds of tokenizers, and their fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megamask.config import build_config
from megamask.data.tokenizer import TextTokenizer, load_tokenizer
from megamask.errors import ArtifactError, ConfigError

TEXT = "the mask keeps two of every four weights, doc7x. <eos>"


def load(path: Path, eod: str | None = "auto") -> TextTokenizer:
    return load_tokenizer(build_config({"data": {"tokenizer": str(path), "eod": eod}}))


def test_hugging_face_folder(tokenizer_folder: Path) -> None:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer = load(tokenizer_folder)
    assert (tokenizer.eod, tokenizer.bos, tokenizer.vocab_size) == (0, 1, 320)
    ids = tokenizer.encode(TEXT)
    assert (
        0 not in ids and 0 in plain.encode(TEXT).ids
    )  # a special token spelled out in the text is text
    assert plain.decode(ids) == TEXT
    assert tokenizer.encode_batch(["two", TEXT]) == [tokenizer.encode("two"), ids]


def test_a_tokenizer_written_in_python(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load(tmp_path)
    assert tokenizer.encode("two") == [
        ord(letter) + 3 for letter in "two"
    ]  # ByT5: bytes after three special ids
    assert tokenizer.eod == 1 and tokenizer.bos is None
    assert 1 not in tokenizer.encode("a </s> b")
    assert tokenizer.fingerprint == load(tmp_path).fingerprint


def test_sentencepiece_model(sentencepiece_model: Path) -> None:
    import sentencepiece

    plain = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load(sentencepiece_model)
    assert (tokenizer.eod, tokenizer.bos, tokenizer.vocab_size) == (
        plain.eos_id(),
        plain.bos_id(),
        120,
    )
    assert tokenizer.encode(TEXT) == plain.encode(TEXT)
    assert plain.decode(tokenizer.encode("the mask keeps two")) == "the mask keeps two"


def test_eod_can_be_chosen(tokenizer_folder: Path, sentencepiece_model: Path) -> None:
    assert load(tokenizer_folder, "<end>").eod == 2
    assert load(sentencepiece_model, "<s>").eod == 1
    assert load(tokenizer_folder, None).eod is load(sentencepiece_model, None).eod is None
    for path in (tokenizer_folder, sentencepiece_model):
        with pytest.raises(ConfigError, match=r"data\.eod"):
            load(path, "<absent>")


def test_fingerprint_follows_the_vocabulary_and_not_the_place(
    tokenizer_folder: Path, other_tokenizer_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    parts = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(parts, indent=7))
    fingerprint = load(tokenizer_folder).fingerprint
    assert load(copy).fingerprint == fingerprint
    assert load(other_tokenizer_folder).fingerprint != fingerprint
    parts["model"]["merges"] = parts["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(parts))
    assert load(copy).fingerprint != fingerprint


def test_what_is_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    for name in ("absent", "broken.model", "empty"):
        with pytest.raises(ArtifactError, match="data.tokenizer"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer"])  # the second changes ids
def test_a_label_does_not_change_the_published_tokenizer(
    tokenizer_folder: Path, tmp_path: Path, name: str
) -> None:
    """The class in tokenizer_config.json may build another tokenizer: tokenizer.json counts."""
    from tokenizers import Tokenizer

    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "labelled"))
    label = folder / "tokenizer_config.json"
    label.write_text(
        json.dumps(
            {**json.loads(label.read_text()), "tokenizer_class": name, "add_prefix_space": True}
        )
    )
    text = "two  spaces and a tab\tand\nlines"
    published = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = load_tokenizer(build_config({"data": {"tokenizer": str(folder)}})).encode(text)
    assert ids == published.encode(text, add_special_tokens=False).ids
    assert published.decode(ids) == text
