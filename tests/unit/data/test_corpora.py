"""Readers of every corpus kind, and the errors a user can make."""

from __future__ import annotations

import ast
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megamask.config import CorpusSection
from megamask.data import stdlib
from megamask.data.corpora import documents, source_stamp
from megamask.data.document import Document
from megamask.data.split import split_documents
from megamask.errors import ArtifactError, ConfigError


def texts(**corpus: Any) -> list[str]:
    return [document.text for document in documents("d", CorpusSection(**corpus))]


def test_text_reads_a_file_a_folder_and_a_glob_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (
        ("b.txt", "bee"),
        ("a.txt", "ant"),
        ("sub/c.txt", "cat"),
        (".hidden", "no"),
        ("blank.txt", " \n"),
    ):
        (tmp_path / name).write_text(text)
    assert texts(kind="text", path=str(tmp_path / "b.txt")) == ["bee"]
    assert texts(kind="text", path=str(tmp_path)) == ["ant", "bee", "cat"]
    assert texts(kind="text", path=str(tmp_path / "*.txt")) == ["ant", "bee"]


def test_a_link_to_a_folder_is_read_once(tmp_path: Path) -> None:
    """As corpora on clusters are put together; one leads back to the top, and two to one folder."""
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder, name in ((corpus / "a", "ant"), (elsewhere, "bee")):
        folder.mkdir(parents=True)
        (folder / f"{name}.txt").write_text(name)
    for name, target in (("b", elsewhere), ("c", elsewhere), ("d", corpus)):
        (corpus / name).symlink_to(target)
    assert texts(kind="text", path=str(corpus)) == ["ant", "bee"]


def test_a_local_dataset_is_known_by_its_files(tmp_path: Path) -> None:
    """So its shards are made again when they change; one of the Hub has its name alone."""
    (tmp_path / "train.jsonl").write_text("{}")
    local = CorpusSection(kind="hf", path=str(tmp_path))
    before = source_stamp("d", local)
    assert source_stamp("d", local) == before
    (tmp_path / "train.jsonl").write_text('{"text": "other"}')
    assert source_stamp("d", local) != before
    assert source_stamp("d", CorpusSection(kind="hf", path="org/name")) == ["org/name"]


def test_jsonl_reads_plain_and_gzip_and_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": null}\n{"body": "two"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write('{"body": "three"}\n')
    assert texts(kind="jsonl", path=str(tmp_path), field="body") == ["one", "two", "three"]


def test_max_bytes_cuts_the_last_document_at_a_whole_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaaa")
    (tmp_path / "b.txt").write_text("éééé")  # two bytes each
    assert texts(kind="text", path=str(tmp_path), max_bytes=4) == ["aaaa"]
    assert texts(kind="text", path=str(tmp_path), max_bytes=9) == ["aaaa", "éé"]
    assert texts(kind="text", path=str(tmp_path), max_bytes=100) == ["aaaa", "éééé"]


def test_stdlib_is_python_source_without_tests() -> None:
    sources = texts(kind="stdlib", max_bytes=600_000)
    assert sources == texts(kind="stdlib", max_bytes=600_000)
    assert sum(len(source.encode()) for source in sources) in range(599_990, 600_001)
    ast.parse(sources[0])
    names = {
        part
        for file in stdlib._files(Path(ast.__file__).parent)
        for part in file.relative_to(Path(ast.__file__).parent).parts
    }
    assert {"ast.py", "json", "decoder.py"} <= names
    assert names.isdisjoint({"test", "tests", "idlelib", "site-packages", "pydoc_data"})


@pytest.fixture(scope="module")
def pydocs() -> list[Document]:
    return list(documents("d", CorpusSection(kind="pydocs", max_bytes=1_000_000)))


def test_pydocs_are_prose_keyed_by_their_source_without_repeated_paragraphs(
    pydocs: list[Document],
) -> None:
    found = pydocs
    sources = set(stdlib.sources())
    of_modules = [document for document in found if document.key in sources]
    topics = [document for document in found if document.key not in sources]
    assert len(of_modules) > 20 and len(topics) > 20
    assert all(document.key != document.text for document in of_modules)
    paragraphs = [
        " ".join(paragraph.split())
        for document in found[:-1]
        for paragraph in document.text.split("\n\n")
    ]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= stdlib.MIN_PARAGRAPH]
    assert len(long) == len(set(long))


def test_prose_of_a_held_out_file_is_held_out_and_the_help_topics_are_no_code(
    pydocs: list[Document],
) -> None:
    sides: dict[str, dict[str, set[str]]] = {}
    code = list(documents("d", CorpusSection(kind="stdlib", max_bytes=1_000_000)))
    for kind, found in (("stdlib", code), ("pydocs", pydocs)):
        sides[kind] = {"train": set(), "heldout": set()}
        for side, document in split_documents(found, 0.1):
            sides[kind][side].add(document.key)
    assert sides["stdlib"]["heldout"] & sides["pydocs"]["heldout"]
    assert sides["stdlib"]["train"].isdisjoint(sides["pydocs"]["heldout"])
    assert sides["pydocs"]["train"].isdisjoint(sides["stdlib"]["heldout"])
    assert not any(
        "topics = {" in source[:500]
        for source in sides["stdlib"]["train"] | sides["stdlib"]["heldout"]
    )


def test_pydocs_go_on_without_help_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "pydoc_data.topics", None
    )  # what the import system itself uses for "not there"
    found = list(documents("d", CorpusSection(kind="pydocs", max_bytes=50_000)))
    assert found[0].key in set(stdlib.sources())


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    assert texts(kind="parquet", path=str(tmp_path)) == ["one", "two"]
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.field.*n, text"):
        texts(kind="parquet", path=str(tmp_path), field="body")
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.field.*holds int"):
        texts(kind="parquet", path=str(tmp_path), field="n")
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(ArtifactError, match=r"b\.parquet.*not a readable Parquet"):
        texts(kind="parquet", path=str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "files"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array(["one"]), pyarrow.array(["two"])]
    table = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.field.*has 2 of that name"):
        texts(kind=kind, path=str(tmp_path))


def test_hf_streams_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n"
    )
    assert texts(kind="hf", path=str(tmp_path)) == ["one", "two"]
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.field"):
        texts(kind="hf", path=str(tmp_path), field="body")
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.path"):
        texts(kind="hf", path=str(tmp_path), split="absent")


@pytest.mark.parametrize(("kind", "library"), [("parquet", "pyarrow"), ("hf", "datasets")])
def test_a_missing_library_is_named(
    kind: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ConfigError, match=rf"data\.domains\.d\.kind.*pip install {library}"):
        texts(kind=kind, path=str(tmp_path))


@pytest.mark.parametrize("kind", ["text", "jsonl", "hf"])
def test_a_path_is_needed(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.path"):
        texts(kind=kind)


def test_a_path_that_matches_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path / "*.txt", tmp_path):
        with pytest.raises(ConfigError, match=r"data\.domains\.d\.path"):
            texts(kind="text", path=str(path))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ArtifactError, r"no text.*data\.domains\.d"),
        (b'{"text": " "}\n', ArtifactError, r"no text.*data\.domains\.d"),
        (b'{"body": "one"}\n', ConfigError, r"data\.domains\.d\.field.*body"),
        (b'{"text": 3}\n', ConfigError, r"data\.domains\.d\.field.*int"),
        (b'{"text": "one"\n', ArtifactError, "line 1 is not JSON"),
        (b'["one"]\n', ArtifactError, "line 1 is not a JSON object"),
        (b"\xff\xfe", ArtifactError, r"data\.domains\.d\.path"),
    ],
)
def test_jsonl_that_cannot_be_used(
    content: bytes, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(error, match=message):
        texts(kind="jsonl", path=str(tmp_path))


def test_truncated_gzip_and_binary_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 1000)[:40])
    with pytest.raises(ArtifactError, match="cannot be read to its end"):
        texts(kind="jsonl", path=str(tmp_path))
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        texts(kind="text", path=str(tmp_path / "picture.txt"))


def test_half_a_surrogate_is_replaced_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [r'{"text": "cut \ud83d"}', r'{"text": "whole \ud83d\ude00"}', '{"text": "plain"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level("WARNING"):
        found = texts(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    assert found == ["cut \ufffd", "whole \U0001f600", "plain"]
    assert "1 documents held half a surrogate pair" in caplog.text


@pytest.mark.parametrize(("kind", "text"), [("text", "ant"), ("jsonl", '{"text": "ant"}')])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert texts(kind=kind, path=str(tmp_path / f"a.{kind}")) == ["ant"]


def test_max_bytes_below_the_first_character_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é")
    with pytest.raises(ArtifactError, match="holds no text"):
        texts(kind="text", path=str(tmp_path), max_bytes=1)


def test_paths_that_cannot_be_looked_up_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.path"):
        texts(kind="text", path="a/" * 3000)


def test_json_without_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * 200_000 + "\n")
    with pytest.raises(ArtifactError, match="line 1 is not JSON"):
        texts(kind="jsonl", path=str(tmp_path / "a.jsonl"))
