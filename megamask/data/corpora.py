"""Sources of text: one reader for each corpus kind; every reader yields documents in a fixed order.

A new corpus kind is a reader function here, a line in ``READERS`` and a value of
``CorpusSection.kind``.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.config import CorpusSection
from megamask.data import stdlib
from megamask.errors import ArtifactError, ConfigError

log = logging.getLogger(__name__)
SUFFIXES = {"text": ("",), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        text: the text itself.
        key: the hash of this string decides whether the document is held out. It is the document's
            own text, or the text that the document was taken from.
    """

    text: str
    key: str


def documents(name: str, corpus: CorpusSection) -> Iterator[Document]:
    """The documents of domain ``name`` in a fixed order, without blank documents.

    The stream ends after ``corpus.max_bytes`` bytes of UTF-8; the last document is cut there.

    Raises:
        ConfigError: a setting ``data.domains.<name>.*`` cannot work (no such file, no such column,
            missing library).
        ArtifactError: a file cannot be read as its kind, or the corpus holds no text.
    """
    left = corpus.max_bytes if corpus.max_bytes is not None else sys.maxsize
    is_empty, replaced = True, 0
    for raw in READERS[corpus.kind](name, corpus):
        document, broken = _encodable(raw)
        replaced += broken
        if not document.text.strip():
            continue
        size = len(document.text.encode())
        if size > left:
            document = Document(document.text.encode()[:left].decode(errors="ignore"), document.key)
        if document.text:
            is_empty = False
            yield document
        left -= size
        if left <= 0:
            break
    if replaced:
        problem = "data.domains.%s: %d documents held half a surrogate pair, read as U+FFFD"
        log.warning(problem, name, replaced)
    if is_empty:
        raise ArtifactError(
            corpus.path or corpus.kind,
            f"holds no text (data.domains.{name})",
            f"Give data.domains.{name} a corpus with text and max_bytes enough, or remove it.",
        )


def _encodable(document: Document) -> tuple[Document, bool]:
    """The document with U+FFFD for each half of a surrogate pair, which no encoding can write, and
    whether there was one. JSON may hold such halves: text that was cut within an emoji.
    """
    try:
        document.text.encode()
        document.key.encode()
    except UnicodeEncodeError:
        text, key = (
            part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for part in (document.text, document.key)
        )
        return Document(text, key), True
    return document, False


def source_stamp(name: str, corpus: CorpusSection) -> list[Any]:
    """Facts that change when the source changes although no setting did.

    For files these are names, sizes and times of modification; for the text of the Python
    installation it is the Python version.

    Raises:
        ConfigError: the path is not given or matches nothing.
    """
    if corpus.kind in SUFFIXES:
        stats = [(str(path), path.stat()) for path in _files(name, corpus)]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    if corpus.kind == "hf":
        return [_required_path(name, corpus)]
    return [sys.version]


def _files(name: str, corpus: CorpusSection) -> list[Path]:
    """The sorted files of a path: a file, a glob, or all files of the kind below a folder."""
    given = _required_path(name, corpus)
    path = Path(given).expanduser()
    try:
        path.is_dir()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        shown = given if len(given) <= 80 else f"{given[:77]}..."
        allowed = f"a path that can be looked up ({error.__class__.__name__})"
        raise ConfigError(
            f"data.domains.{name}.path", shown, allowed, "Correct the path."
        ) from None
    if path.is_dir():
        candidates = [
            file
            for file in path.rglob("*")
            if file.name.endswith(SUFFIXES[corpus.kind]) and not _hidden(file.relative_to(path))
        ]
    elif path.is_file():
        candidates = [path]
    else:
        candidates = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = sorted(file for file in candidates if file.is_file())
    if not files:
        allowed = f"a file, folder or glob with {corpus.kind} files; nothing was found there"
        raise ConfigError(f"data.domains.{name}.path", given, allowed, "Correct the path.")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _required_path(name: str, corpus: CorpusSection) -> str:
    if not corpus.path:
        wanted = "a dataset name" if corpus.kind == "hf" else "a file, folder or glob"
        raise ConfigError(
            f"data.domains.{name}.path",
            corpus.path,
            f"kind {corpus.kind} needs {wanted}",
            f"Set data.domains.{name}.path.",
        )
    return corpus.path


def _missing_column(name: str, corpus: CorpusSection, where: Any, columns: Any) -> ConfigError:
    allowed = f"a text column of {where}; it has {', '.join(sorted(map(str, columns))) or 'none'}"
    return ConfigError(
        f"data.domains.{name}.field",
        corpus.field,
        allowed,
        f"Set data.domains.{name}.field to one of them.",
    )


def _missing_library(name: str, corpus: CorpusSection, library: str) -> ConfigError:
    allowed = f"reading it needs the Python package {library}, which is not installed"
    return ConfigError(
        f"data.domains.{name}.kind", corpus.kind, allowed, f"Run: pip install {library}"
    )


def _own_key(text: str) -> Document:
    return Document(text, key=text)


def _read_stdlib(name: str, corpus: CorpusSection) -> Iterator[Document]:
    return (_own_key(source) for source in stdlib.sources())


def _read_pydocs(name: str, corpus: CorpusSection) -> Iterator[Document]:
    return (Document(prose, source) for prose, source in stdlib.prose())


def _read_text(name: str, corpus: CorpusSection) -> Iterator[Document]:
    for file in _files(name, corpus):
        try:
            yield _own_key(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ArtifactError(
                file,
                f"is not UTF-8 text ({error.reason})",
                f"Narrow data.domains.{name}.path to text files.",
            ) from error


def _read_jsonl(name: str, corpus: CorpusSection) -> Iterator[Document]:
    for file in _files(name, corpus):
        for number, line in enumerate(_lines(name, file), 1):
            if line.strip():
                yield _own_key(
                    _text_of(
                        name, corpus, _parse(name, file, number, line), f"{file}, line {number}"
                    )
                )


def _lines(name: str, file: Path) -> Iterator[str]:
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as stream:
            yield from stream
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ArtifactError(
            file,
            f"cannot be read to its end ({error})",
            f"Restore the file or change data.domains.{name}.path.",
        ) from error


def _parse(name: str, file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            file,
            f"line {number} is not JSON ({error})",
            f"Correct it or change data.domains.{name}.path.",
        ) from error
    if not isinstance(record, dict):
        raise ArtifactError(
            file,
            f"line {number} is not a JSON object",
            f"Correct it or change data.domains.{name}.path.",
        )
    return record


def _text_of(name: str, corpus: CorpusSection, record: dict[str, Any], where: str) -> str:
    """The text of one record; a null is a blank text."""
    if corpus.field not in record:
        raise _missing_column(name, corpus, where, record)
    value = record[corpus.field]
    if value is not None and not isinstance(value, str):
        allowed = f"a column of text; in {where} it holds {type(value).__name__}"
        raise ConfigError(
            f"data.domains.{name}.field",
            corpus.field,
            allowed,
            "Name the column that holds the text.",
        )
    return value or ""


def _read_parquet(name: str, corpus: CorpusSection) -> Iterator[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _missing_library(name, corpus, "pyarrow") from None
    for file in _files(name, corpus):
        try:
            table = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise ArtifactError(
                file,
                f"is not a readable Parquet file ({error})",
                f"Correct data.domains.{name}.path.",
            ) from error
        if corpus.field not in table.schema_arrow.names:
            raise _missing_column(name, corpus, file, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[corpus.field]):
            yield from (
                _own_key(_text_of(name, corpus, record, str(file))) for record in batch.to_pylist()
            )


def _read_hf(name: str, corpus: CorpusSection) -> Iterator[Document]:
    path = _required_path(name, corpus)
    try:
        import datasets
    except ImportError:
        raise _missing_library(name, corpus, "datasets") from None
    try:
        stream = datasets.load_dataset(path, corpus.config, split=corpus.split, streaming=True)
    # The library raises errors of many types: not found, offline, unknown split or configuration.
    except Exception as error:
        allowed = (
            f"a dataset that can be opened with config={corpus.config!r}, "
            f"split={corpus.split!r} ({error})"
        )
        raise ConfigError(
            f"data.domains.{name}.path",
            path,
            allowed,
            "Check the name, config and split, and the network.",
        ) from error
    records, read = iter(stream), 0
    while True:
        try:
            record = next(records, None)
        except Exception as error:  # the network, the hub, a broken file of the dataset
            problem = f"cannot be read on after {read:,} records ({error})"
            fix = "Run the verb again, or point data.domains at a copy of the dataset on disk."
            raise ArtifactError(path, problem, fix) from error
        if record is None:
            return
        read += 1
        yield _own_key(_text_of(name, corpus, record, path))


READERS: dict[str, Callable[[str, CorpusSection], Iterator[Document]]] = {
    "stdlib": _read_stdlib,
    "pydocs": _read_pydocs,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "hf": _read_hf,
}
