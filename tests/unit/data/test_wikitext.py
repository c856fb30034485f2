"""The text of WikiText-2 from each kind of file, and the files that are refused."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.config import Config
from megamask.data.wikitext import cut, wikitext
from megamask.errors import ArtifactError, ConfigError
from tests.unit.data.conftest import make_document

ROWS = ["", " = Title = \n", "", *(f" {make_document(number)} \n" for number in range(4))]
TEXT = "\n\n".join(ROWS)
VOCAB = 320


@pytest.fixture
def measured(make_config: Callable[..., Config]) -> Callable[..., Any]:
    """The windows of 32 tokens of a file."""

    def read(file: Path | str | None, vocab: int = VOCAB, **data: Any) -> Any:
        text = None if file is None else str(file)
        evaluate = {"protocol": "wikitext2-2048", "text": text}
        return wikitext(make_config({}, evaluate=evaluate, **data), 32, vocab)

    return read


def test_rows_and_joined_text_are_the_same_text(
    tmp_path: Path, measured: Callable[..., Any], tokenizer_folder: Path
) -> None:
    import pyarrow
    import pyarrow.parquet as parquet
    from transformers import AutoTokenizer

    rows = "".join(json.dumps({"text": row, "page": 1}) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "a.txt").write_text(TEXT)
    parquet.write_table(pyarrow.table({"text": ROWS}), tmp_path / "a.parquet")
    ids = AutoTokenizer.from_pretrained(tokenizer_folder)(TEXT)["input_ids"]
    for name in ("a.jsonl", "a.json.gz", "a.txt", "a.parquet"):
        found = measured(tmp_path / name)
        assert found.source == str(tmp_path / name) and not found.has_bos
        assert len(found.windows_NS) == len(ids) // 32 > 3
        assert found.windows_NS.flatten().tolist() == ids[: found.windows_NS.numel()]
    assert len({measured(tmp_path / name).sha256 for name in ("a.jsonl", "a.txt")}) == 1


def test_one_bos_at_the_start_of_the_whole_text(
    tmp_path: Path, measured: Callable[..., Any]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    plain, found = measured(tmp_path / "a.txt"), measured(tmp_path / "a.txt", bos=True)
    assert found.has_bos
    expected = [1, *plain.windows_NS.flatten().tolist()][: found.windows_NS.numel()]
    assert found.windows_NS.flatten().tolist()[: len(expected)] == expected
    assert (found.windows_NS == 1).sum() == 1


def test_the_tail_is_dropped_and_windows_do_not_overlap() -> None:
    assert cut(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("a.txt", b"", ArtifactError, "holds no text"),
        ("a.txt", b" \n\n", ArtifactError, "holds no text"),
        ("a.txt", b"short", ArtifactError, r"tokens, too few for one window of 32"),
        ("a.txt", b"\xff\xfe", ArtifactError, "is not UTF-8 text"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1", ArtifactError, "Git LFS"),
        ("a.jsonl", b'{"body": "x"}\n', ConfigError, r"text column of .* it has body"),
        ("a.jsonl", b'{"text": 3}\n', ConfigError, "holds int"),
        ("a.jsonl", b"{", ArtifactError, "line 1 is not JSON"),
        ("a.parquet", b"no", ArtifactError, "not a readable Parquet"),
        ("a.gz", b"no", ConfigError, r"its rows as \.jsonl"),
        ("wiki.test.raw", TEXT.encode(), ConfigError, r"joined by two line feeds as \.txt"),
        ("wiki.test.raw.gz", b"", ConfigError, r"joined by two line feeds as \.txt"),
    ],
)
def test_files_that_cannot_be_measured(
    name: str,
    content: bytes,
    error: type[Exception],
    says: str,
    tmp_path: Path,
    measured: Callable[..., Any],
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=says) as refused:
        measured(tmp_path / name)
    assert "evaluate.text" in str(refused.value) and "data.domains" not in str(refused.value)


def test_places_without_a_file(tmp_path: Path, measured: Callable[..., Any]) -> None:
    for path, says in (
        (tmp_path / "absent.txt", "does not exist"),
        (tmp_path, "is no file"),
        (f"{'x' * 5000}.txt", "does not exist"),
    ):
        with pytest.raises(ArtifactError, match=says):
            measured(path)


def test_the_hub_needs_its_package(
    measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = r"evaluate\.text = None: null reads Salesforce/wikitext of the Hub: .* package datasets"
    with pytest.raises(ConfigError, match=said):
        measured(None)


def test_the_model_knows_every_id(tmp_path: Path, measured: Callable[..., Any]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ArtifactError, match="the model knows the 300 below"):
        measured(tmp_path / "a.txt", vocab=300)
