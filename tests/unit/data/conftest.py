"""Small real corpora and tokenizers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.config import Config, build_config

SENTENCE = (
    "the mask keeps two of every four weights in a row and learns which ones matter "
    "for the text that it reads"
)


def make_document(number: int) -> str:
    """A document that names itself in every sentence."""
    choose = random.Random(number)
    sentences = [
        " ".join(choose.choices(SENTENCE.split(), k=choose.randint(5, 12))) + f" doc{number}x."
        for _ in range(choose.randint(3, 12))
    ]
    return " ".join(sentences)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({field: text, "id": index}) + "\n" for index, text in enumerate(texts))
    )
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train_bpe(tmp_path_factory.mktemp("tokenizer"), vocab_size=320)


@pytest.fixture(scope="session")
def other_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train_bpe(tmp_path_factory.mktemp("other_tokenizer"), vocab_size=300)


def _train_bpe(folder: Path, vocab_size: int) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<bos>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_document(number) for number in range(40)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([make_document(number) for number in range(40)]),
            model_writer=stream,
            model_type="bpe",
            vocab_size=120,
            minloglevel=2,
        )
    return path


@pytest.fixture
def make_config(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Config]:
    """Settings of a run in ``tmp_path`` with the given domains and other keys of the section
    data.
    """

    def make(
        domains: dict[str, Any], *, calibration: Any = None, evaluate: Any = None, **data: Any
    ) -> Config:
        data = {"tokenizer": str(tokenizer_folder), "domains": domains, **data}
        return build_config(
            {
                "run_dir": str(tmp_path / "run"),
                "data": data,
                "calibration": calibration or {},
                "evaluate": evaluate or {},
            }
        )

    return make


@pytest.fixture
def two_domains(tmp_path: Path, make_config: Callable[..., Config]) -> Callable[..., Config]:
    """Domains a (documents 0-59) and b (documents 100-159), a quarter of each held out."""
    domains = {}
    for name, first in (("a", 0), ("b", 100)):
        path = write_jsonl(
            tmp_path / f"{name}.jsonl",
            [make_document(number) for number in range(first, first + 60)],
        )
        domains[name] = {"kind": "jsonl", "path": str(path), "heldout": 0.25}
    return lambda **more: make_config(domains, **more)
