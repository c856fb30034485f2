"""The text set-ups of the field: the same documents in give the same tokens out, whatever the
name, the compression and the encoding of the files.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamask.config import Config, CorpusSection, run_paths
from megamask.data.corpora import documents, files_left_out
from megamask.data.heldout import heldout_windows
from megamask.data.shards import read_shards
from megamask.errors import ArtifactError, ConfigError
from megamask.verbs import tokenize

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")

TEXTS = ["first line\nsecond line", "é, ß, 漢字, \U0001f600", "tabs\tand  spaces ", 'quo"ted \\']
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(pyarrow.compress(data, codec="zstd", asbytes=True)),
}
ENCODE: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "no last line feed": lambda text: text.rstrip("\n").encode(),
}


def texts(**corpus: Any) -> list[str]:
    return [document.text for document in documents("d", CorpusSection(**corpus))]


def jsonl(rows: list[str], field: str = "text", escape: bool = False) -> str:
    """Rows as C4 and SlimPajama have them: other columns too, and a nested one."""
    more = {"meta": {"redpajama_set_name": "C4"}, "url": "http://x", "timestamp": "2019"}
    records = [{field: text, **more} for text in rows]
    return "".join(json.dumps(record, ensure_ascii=escape) + "\n" for record in records)


@pytest.mark.parametrize("kind", ["jsonl", "files"])
def test_every_suffix_compression_and_encoding(
    tmp_path: Path, make_config: Callable[..., Config], kind: str
) -> None:
    """All combinations are read as the plain file is; their tokens are the same."""
    cases = list(itertools.product((".jsonl", ".json", ".ndjson"), COMPRESS, ENCODE, (0, 1)))
    for number, (suffix, compression, encoding, escape) in enumerate(cases):
        file = tmp_path / f"{number}" / f"c4-train.00000-of-01024{suffix}{compression}"
        file.parent.mkdir()
        text = jsonl(TEXTS, escape=bool(escape))
        file.write_bytes(COMPRESS[compression](ENCODE[encoding](text)))
        for path in (file, file.parent):
            assert texts(kind=kind, path=str(path)) == TEXTS, file
    domains = {
        f"d{number}": {"kind": kind, "path": str(tmp_path / f"{number}"), "heldout": 0.3}
        for number in (0, 7, 13, 22, 31, 39)
    }
    config = make_config(domains)
    tokenize.run(config)
    first, *others = (read_shards(run_paths(config).shards / name) for name in domains)
    for other, split in itertools.product(others, ("train", "heldout")):
        np.testing.assert_array_equal(first.stream(split), other.stream(split))


@pytest.mark.parametrize("compression", COMPRESS)
def test_plain_text_in_every_compression_and_encoding(tmp_path: Path, compression: str) -> None:
    text = "first line\nsecond é\n"
    for number, encode in enumerate(ENCODE.values()):
        file = tmp_path / f"{number}.txt{compression}"
        file.write_bytes(COMPRESS[compression](encode(text)))
        for kind in ("text", "files"):
            assert [one.rstrip("\n") for one in texts(kind=kind, path=str(file))] == [text.rstrip()]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("c4/en/c4-train.00000-of-01024.json.gz", "text"),
        ("SlimPajama-627B/train/chunk1/example_train_0.jsonl.zst", "text"),
        ("pile/train/00.jsonl.zst", "text"),
        ("dolma/v1_5r1_sample/books-0000.json.gz", "text"),
        ("oscar/en_meta/en_meta_part_1.jsonl.zst", "content"),
        ("rp1/cc/2023-06/en_head_0000.json.gz.dedup.classifier.jsonl.zst", "text"),
        ("rp2/documents/2023-06/0000/en_head.json.gz", "raw_content"),
        ("fineweb/data/CC-MAIN-2024-10/000_00000.parquet", "text"),
        ("wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet", "text"),
        ("stack/data/python/train-00000-of-00206.parquet", "content"),
        ("saved/data-00000-of-00001.arrow", "text"),
    ],
)
def test_a_folder_as_it_is_published(tmp_path: Path, name: str, field: str) -> None:
    """The folder has its card, its notes and its checksums beside the text; none is read."""
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = pyarrow.table({field: ["", *TEXTS], "score": [0.5] * 5})  # WikiText has blank rows
        parquet.write_table(table, file, row_group_size=2)
    elif file.suffix == ".arrow":
        table = pyarrow.table({field: TEXTS})
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
        file.with_name("cache-0123456789abcdef.arrow").write_bytes(file.read_bytes())
    else:
        file.write_bytes(COMPRESS[file.suffix](jsonl(TEXTS, field).encode()))
    top = tmp_path / Path(name).parts[0]
    notes = ("README.md", "dataset_info.json", "state.json", "SHA256SUMS.txt", "LICENSE")
    for note in (*notes, ".gitattributes", "loader.py"):
        (top / note).write_text("{\n no text of the corpus\n}\n")
    (top / ".cache" / "huggingface").mkdir(parents=True)
    (top / ".cache" / "huggingface" / "part.json").write_text("no")
    assert texts(kind="files", path=str(top), field=field) == TEXTS
    left_out = {
        path.name for path in files_left_out("d", CorpusSection(kind="files", path=str(top)))
    }
    assert {*notes, "loader.py"} <= left_out and file.name not in left_out
    if file.suffix in COMPRESS:
        assert texts(kind="jsonl", path=str(top), field=field) == TEXTS


def test_a_folder_with_formats_mixed_is_read_in_the_order_of_the_names(
    tmp_path: Path, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as parquet

    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.jsonl").write_text(jsonl(["four"]))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(jsonl(["one"]).encode()))
    parquet.write_table(pyarrow.table({"text": ["two"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "README.md").write_text("no")
    (tmp_path / "dataset_info.json").write_text("{\n}")
    assert texts(kind="files", path=str(tmp_path)) == ["one", "two", "three", "four"]
    assert texts(kind="jsonl", path=str(tmp_path)) == ["one", "four"]
    tokenize.run(make_config({"d": {"kind": "files", "path": str(tmp_path)}}))
    said = capsys.readouterr().err
    assert said.count("README.md") == 1 and said.count("dataset_info.json") == 1


def test_rows_joined_as_the_protocol_of_wikitext_joins_them(
    tmp_path: Path, make_config: Callable[..., Config], tokenizer_folder: Path
) -> None:
    """One document, with the blank rows, tokenized as a whole, and one BOS before it if wanted."""
    import pyarrow.parquet as parquet
    from tokenizers import Tokenizer

    rows = ["", " = Title = \n", "", " A row of text . \n" * 9, " Another , without end"]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "test.parquet")
    file = tmp_path / "test.parquet"
    corpus = {"kind": "parquet", "path": str(file), "join": "\n\n", "heldout": 1}
    whole = "\n\n".join(rows)
    assert texts(**corpus) == [whole]
    assert texts(**corpus, max_bytes=20) == [whole[:20]]
    train = {"kind": "stdlib", "max_bytes": 1000, "heldout": 0}
    config = make_config({"w": corpus, "t": train}, evaluate={"bos": True})
    tokenize.run(config)
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ids = plain.encode(whole, add_special_tokens=False).ids
    assert read_shards(run_paths(config).shards / "w").stream("heldout").tolist() == [*ids, 0]
    windows = heldout_windows(config, "w", 16, None)
    assert windows.flatten().tolist() == [1, *ids, 0][: windows.numel()] and len(windows) > 3
    assert texts(kind="parquet", path=str(file)) != [whole]


def test_members_of_a_joined_file_and_marks_within_are_read(tmp_path: Path) -> None:
    """``cat a.gz b.gz`` and parallel compressors make files of several members."""
    for number, (suffix, compress) in enumerate(COMPRESS.items()):
        parts = [compress(b"\xef\xbb\xbf" + jsonl([text]).encode()) for text in TEXTS]
        file = tmp_path / f"{number}.jsonl{suffix}"
        file.write_bytes(b"".join(parts))
        assert texts(kind="jsonl", path=str(file)) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_bad_line_and_a_torn_file_are_named(tmp_path: Path, compression: str) -> None:
    lines = jsonl(["ant"] * 3000).encode()
    bad = tmp_path / f"bad.jsonl{compression}"
    for content, said in (
        (b"{]\n", "line 3001 is not JSON"),
        (b"\xff\xfe\n", "line 3001 is not UTF-8"),
    ):
        bad.write_bytes(COMPRESS[compression](lines + content))
        with pytest.raises(ArtifactError, match=rf"bad\.jsonl{compression}.*{said}"):
            texts(kind="jsonl", path=str(bad))
    if compression:
        torn = tmp_path / f"torn.jsonl{compression}"
        torn.write_bytes(COMPRESS[compression](lines)[:-9])
        with pytest.raises(ArtifactError, match=rf"torn\.jsonl{compression}.*to its end, after"):
            texts(kind="jsonl", path=str(torn))
        torn.write_bytes(b"this is not compressed\n")
        with pytest.raises(ArtifactError, match=rf"torn\.jsonl{compression}.*to its end, after"):
            texts(kind="jsonl", path=str(torn))


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.txt", "a.txt.gz", "a.raw"],
)
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ArtifactError, match="pointer of Git LFS.*git lfs pull"):
        texts(kind="files", path=str(tmp_path))


def test_a_torn_table_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": [f"document {number}" for number in range(5000)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2500, compression="gzip")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"a\.parquet.*not a readable Parquet file after row"):
        texts(kind="parquet", path=str(tmp_path / "a.parquet"))
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    whole = (tmp_path / "b.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"b\.arrow.*not a readable Arrow file after row"):
        texts(kind="files", path=str(tmp_path / "b.arrow"))


def test_files_of_unknown_formats_are_refused_when_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.path.*a\.tar does not"):
        texts(kind="files", path=str(tmp_path / "*.tar"))
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.path.*nothing was found"):
        texts(kind="files", path=str(tmp_path))


def test_zst_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS[".zst"](jsonl(TEXTS).encode()))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"data\.domains\.d\.path.*pip install pyarrow"):
        texts(kind="jsonl", path=str(tmp_path))
