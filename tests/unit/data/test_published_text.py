"""The published texts from each kind of file, their windows, and the files that are refused."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from megamask.config import Config
from megamask.config.tree import PUBLISHED, ProtocolName
from megamask.data.published_text import PROTOCOLS, published_text
from megamask.data.windows import NO_TARGET, every_target, without_tail
from megamask.errors import ArtifactError, ConfigError
from tests.unit.data.conftest import make_document

ROWS = ["", " = Title = \n", "", *(f" {make_document(number)} \n" for number in range(4))]
TEXT = "\n\n".join(ROWS)
VOCAB = 320


@pytest.fixture
def measured(make_config: Callable[..., Config]) -> Callable[..., Any]:
    """The windows of 32 tokens of a file."""

    def read(
        file: Path | str | None,
        vocab: int = VOCAB,
        protocol: str = "wikitext2-2048",
        **data: Any,
    ) -> Any:
        text = None if file is None else str(file)
        evaluate = {"protocol": protocol, "text": text}
        return published_text(make_config({}, evaluate=evaluate, **data), 32, vocab)

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
        assert len(found.windows.tokens_NS) == len(ids) // 32 > 3
        assert found.windows.tokens_NS.flatten().tolist() == ids[: found.windows.tokens_NS.numel()]
    assert len({measured(tmp_path / name).sha256 for name in ("a.jsonl", "a.txt")}) == 1


def test_one_bos_at_the_start_of_the_whole_text(
    tmp_path: Path, measured: Callable[..., Any]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    plain, found = measured(tmp_path / "a.txt"), measured(tmp_path / "a.txt", bos=True)
    assert found.has_bos
    expected = [1, *plain.windows.tokens_NS.flatten().tolist()][: found.windows.tokens_NS.numel()]
    assert found.windows.tokens_NS.flatten().tolist()[: len(expected)] == expected
    assert (found.windows.tokens_NS == 1).sum() == 1


def test_the_tail_is_dropped_and_windows_do_not_overlap() -> None:
    found = without_tail(list(range(11)), 4)
    assert found.tokens_NS.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.labels_NS.tolist() == [[1, 2, 3, NO_TARGET], [5, 6, 7, NO_TARGET]]
    assert found.targets == 6 and found[1:].targets == 3


@pytest.mark.parametrize("length", range(2, 14))
def test_every_token_but_the_first_is_a_target_once(length: int) -> None:
    """Beside Megatron-LM's ``_LMDataset`` with ``overlapping_eval`` = L, written out."""
    ids, window = list(range(100, 100 + length)), 4
    expected = []
    for start in range(0, length - 1, window):
        part = ids[start : start + window + 1]
        expected.append(list(zip(part[:-1], part[1:], strict=True)))
    found = every_target(ids, window)
    pairs = [
        [(one, next) for one, next in zip(*rows, strict=True) if next != NO_TARGET]
        for rows in zip(found.tokens_NS.tolist(), found.labels_NS.tolist(), strict=True)
    ]
    assert pairs == expected and found.targets == length - 1
    assert found.tokens_NS.max() < 100 + length  # an id that the model knows fills the last window


def test_c4_is_the_first_documents_joined_by_a_space(
    tmp_path: Path, measured: Callable[..., Any], tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    rows = [f"{make_document(number)[:20]}\n{number}" for number in range(1105)]
    lines = "".join(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows)
    (tmp_path / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(lines.encode()))
    found = measured(tmp_path / "c4-validation.00000-of-00008.json.gz", protocol="c4")
    ids = AutoTokenizer.from_pretrained(tokenizer_folder)(" ".join(rows[:1100]))["input_ids"]
    assert found.documents == 1100 and len(ids) > 256 * 32
    assert found.windows.tokens_NS.shape == (256, 32)
    assert found.windows.tokens_NS.flatten().tolist() == ids[: 256 * 32]
    wrong = AutoTokenizer.from_pretrained(tokenizer_folder)("\n\n".join(rows))["input_ids"]
    assert found.windows.tokens_NS.flatten().tolist() != wrong[: 256 * 32]
    with pytest.raises(ArtifactError, match="first validation documents of C4.* a space as"):
        measured(tmp_path / "absent.json.gz", protocol="c4")


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


@pytest.mark.parametrize(
    ("protocol", "dataset"), [("wikitext2-2048", "Salesforce/wikitext"), ("c4", "allenai/c4")]
)
def test_the_hub_needs_its_package(
    protocol: str,
    dataset: str,
    measured: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = rf"evaluate\.text = None: null reads {dataset} of the Hub: .* package datasets"
    with pytest.raises(ConfigError, match=said):
        measured(None, protocol=protocol)


def test_every_published_protocol_has_a_window_and_a_text() -> None:
    assert list(PROTOCOLS) == list(PUBLISHED)
    assert {"heldout", *PUBLISHED} == set(get_args(ProtocolName))


def test_the_model_knows_every_id(tmp_path: Path, measured: Callable[..., Any]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ArtifactError, match="the model knows the 300 below"):
        measured(tmp_path / "a.txt", vocab=300)
