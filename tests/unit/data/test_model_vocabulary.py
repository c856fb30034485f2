"""A tokenizer with more ids than the model is told of, or refused, while text is tokenized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamask.config import Config, run_paths
from megamask.errors import ArtifactError
from megamask.verbs import tokenize
from tests.unit.data.conftest import make_document, write_jsonl
from tests.unit.data.test_in_place import in_place, write_shards

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def with_model(two_domains: Callable[..., Config]) -> Callable[..., Config]:
    """Two domains, and a model of so many ids in the run folder."""

    def make(vocab: int, folder: str = "hf", **more: Any) -> Config:
        config = two_domains(**more)
        known = json.loads((ROOT / "configs" / "models" / "tiny-llama.json").read_text())
        place = run_paths(config).run_dir / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps({**known, "vocab_size": vocab}))
        return config

    return make


@pytest.mark.parametrize("folder", ["hf", "weights"])
def test_an_id_that_the_model_does_not_know_ends_tokenize(
    with_model: Callable[..., Config], folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_model(280, folder)
    with pytest.raises(ArtifactError, match=r"token id \d+, the model knows the 280.*data\.token"):
        tokenize.run(config)
    assert "ids up to 319, the model knows the 280 below" in caplog.text
    assert not (run_paths(config).shards / "a").exists()


def test_ids_that_no_text_has_are_a_warning(
    with_model: Callable[..., Config],
    tokenizer_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tokenizers often have a token for padding that the model has no row for."""
    from tokenizers import Tokenizer

    tokenize.run(with_model(320))
    assert "ids up to" not in caplog.text
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "padding"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<padding>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenize.run(with_model(320, tokenizer=str(folder)))
    assert "ids up to 320, the model knows the 320 below" in caplog.text


def test_the_ends_of_documents_come_first(with_model: Callable[..., Config]) -> None:
    with pytest.raises(ArtifactError, match=r"token id 2, the model knows the 2 below"):
        tokenize.run(with_model(2, eod="<end>"))


def test_shards_in_place(
    tmp_path: Path, with_model: Callable[..., Config], make_config: Callable[..., Config]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [make_document(1)])
    prefix = write_shards(tmp_path / "web", [[5, 6, 7, 300, 0], [5, 6, 0]], np.int32)
    with_model(300)
    with pytest.raises(ArtifactError, match=r"web\.bin.*token id 300, the model knows the 300"):
        tokenize.run(make_config({"d": in_place(prefix)}))
