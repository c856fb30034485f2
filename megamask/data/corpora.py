"""Sources of text: one reader for each corpus kind; every reader yields documents in a fixed order.

A new corpus kind is a reader function here, a line in ``READERS`` and a value of
``CorpusSection.kind``. A new format of files is a line in ``FILE_READERS``, and its endings in
``text_files.FORMATS``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.config import CorpusSection
from megamask.data import stdlib
from megamask.data.document import START, Document, Reached
from megamask.data.text_files import (
    corpus_files,
    files_below,
    format_of,
    lines,
    missing_library,
    required_path,
    unreadable,
    whole_text,
)
from megamask.errors import ArtifactError, ConfigError

log = logging.getLogger(__name__)
ROWS = 1024  # rows of a table that are texts in memory at once


def documents(name: str, corpus: CorpusSection, after: Reached = START) -> Iterator[Document]:
    """The documents of domain ``name`` in a fixed order, without blank documents.

    The stream ends after ``corpus.max_bytes`` bytes of UTF-8; the last document is cut there. With
    ``corpus.join``, all rows are one document, blank rows included.

    Args:
        name: of the domain.
        corpus: its settings.
        after: the stream begins there, for a corpus of files.

    Raises:
        ConfigError: a setting ``data.domains.<name>.*`` cannot work (no such file, no such column,
            missing library).
        ArtifactError: a file cannot be read as its kind, or the corpus holds no text.
    """
    left = (corpus.max_bytes if corpus.max_bytes is not None else sys.maxsize) - after.size
    is_empty, replaced = after == START, 0
    if documents_of_files(corpus):
        raws = _read_files(name, corpus, after.files)
    else:
        raws = READERS[corpus.kind](name, corpus)
    for raw in raws if corpus.join is None else _joined(raws, corpus.join, left):
        document, broken = _encodable(raw)
        replaced += broken
        if not document.text or document.text.isspace():
            continue
        size = document.size
        if size > left:
            cut = document.text.encode()[:left].decode(errors="ignore")
            document = replace(document, text=cut)
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
            "holds no text",
            f"Give data.domains.{name} a corpus with text and max_bytes enough, or remove it.",
        )


def _joined(rows: Iterator[Document], between: str, limit: int) -> Iterator[Document]:
    """One document of the rows in order, read until it has ``limit`` characters."""
    texts, size = [], 0
    for row in rows:
        texts.append(row.text)
        size += len(row.text) + len(between)
        if size > limit:
            break
    yield _own_key(between.join(texts))


def _encodable(document: Document) -> tuple[Document, bool]:
    """The document with U+FFFD for each half of a surrogate pair, which no encoding can write, and
    whether there was one. JSON may hold such halves: text that was cut within an emoji.
    """
    try:
        for part in (document.text, document.key):
            if not part.isascii():
                part.encode()
    except UnicodeEncodeError:
        text, key = (
            part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for part in (document.text, document.key)
        )
        return replace(document, text=text, key=key), True
    return document, False


def source_stamp(name: str, corpus: CorpusSection) -> list[Any]:
    """Facts that change when the source changes although no setting did.

    For files these are names, sizes and times of modification; for the text of the Python
    installation it is the Python version, and for a dataset of the Hub its name alone: a newer
    revision of it is not noticed, and neither is a file that was replaced with its size and time
    kept. The time of the last change of its inode would tell, but a copy, a backup or a
    ``chmod`` changes that too, and terabytes would be tokenized again.

    Raises:
        ConfigError: the path is not given or matches nothing.
    """
    if documents_of_files(corpus):
        stats = [(str(path), path.stat()) for path in corpus_files(name, corpus)[0]]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    if corpus.kind == "hf":
        place = required_path(name, corpus)
        files = sorted(files_below(Path(place))) if Path(place).is_dir() else []
        stats = [(str(path), path.stat()) for path in files]
        return [place, *([path, stat.st_size, stat.st_mtime_ns] for path, stat in stats)]
    return [sys.version]


def files_left_out(name: str, corpus: CorpusSection) -> list[Path]:
    """The files below the folder of a domain that its reader leaves out; none for other kinds.

    Raises:
        ConfigError: the path is not given or matches nothing.
    """
    return corpus_files(name, corpus)[1] if documents_of_files(corpus) else []


def documents_of_files(corpus: CorpusSection) -> bool:
    """Whether the documents of a domain come from files of text or rows."""
    return READERS.get(corpus.kind) is _read_files


def _missing_column(name: str, corpus: CorpusSection, where: Any, columns: Any) -> ConfigError:
    allowed = f"a text column of {where}; it has {', '.join(sorted(map(str, columns))) or 'none'}"
    return ConfigError(
        f"data.domains.{name}.field",
        corpus.field,
        allowed,
        f"Set data.domains.{name}.field to one of them.",
    )


def _own_key(text: str) -> Document:
    return Document(text, key=text)


def _read_stdlib(name: str, corpus: CorpusSection) -> Iterator[Document]:
    return (_own_key(source) for source in stdlib.sources())


def _read_pydocs(name: str, corpus: CorpusSection) -> Iterator[Document]:
    return (Document(prose, source) for prose, source in stdlib.prose())


def _read_files(name: str, corpus: CorpusSection, skipped: int = 0) -> Iterator[Document]:
    """The documents of every file but the first ``skipped``, each file in the format of the kind,
    or of its own name.
    """
    for number, file in enumerate(corpus_files(name, corpus)[0]):
        if number < skipped:
            continue
        form = format_of(file) if corpus.kind == "files" else corpus.kind
        assert form is not None
        for text in FILE_READERS[form](name, corpus, file):
            yield Document(text, text, number)


def _read_text(name: str, corpus: CorpusSection, file: Path) -> Iterator[str]:
    yield whole_text(name, file)


def _read_jsonl(name: str, corpus: CorpusSection, file: Path) -> Iterator[str]:
    for number, line in enumerate(lines(name, file), 1):
        if line.strip():
            record = _parse(name, file, number, line)
            yield _text_of(name, corpus, record, f"{file}, line {number}")


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


def _read_parquet(name: str, corpus: CorpusSection, file: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise missing_library(name, "kind", corpus.kind, "pyarrow") from None
    read = 0
    try:
        table = parquet.ParquetFile(file)
        _check_column(name, corpus, file, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=ROWS, columns=[corpus.field]):
            for row in batch.to_pylist():
                read += 1
                yield _text_of(name, corpus, row, f"{file}, row {read}")
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        problem = f"is not a readable Parquet file after row {read}"
        raise unreadable(name, file, problem, error) from error


def _read_arrow(name: str, corpus: CorpusSection, file: Path) -> Iterator[str]:
    """The rows of an Arrow file as ``datasets`` saves it: a stream, or the file format."""
    try:
        import pyarrow
    except ImportError:
        raise missing_library(name, "kind", corpus.kind, "pyarrow") from None
    read = 0
    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)
            except ValueError:
                held = pyarrow.ipc.open_file(source)
                batches = map(held.get_batch, range(held.num_record_batches))
            for batch in batches:
                _check_column(name, corpus, file, batch.schema.names)
                column = batch.column(corpus.field)
                for start in range(0, len(column), ROWS):
                    for value in column.slice(start, ROWS).to_pylist():
                        read += 1
                        row = {corpus.field: value}
                        yield _text_of(name, corpus, row, f"{file}, row {read}")
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise unreadable(
            name, file, f"is not a readable Arrow file after row {read}", error
        ) from error


def _check_column(name: str, corpus: CorpusSection, file: Path, columns: list[str]) -> None:
    if corpus.field not in columns:
        raise _missing_column(name, corpus, file, columns)
    if (count := columns.count(corpus.field)) > 1:
        allowed = f"the name of one column of {file}; it has {count} of that name"
        fix = "Give each column a name of its own."
        raise ConfigError(f"data.domains.{name}.field", corpus.field, allowed, fix)


FileReader = Callable[[str, CorpusSection, Path], Iterator[str]]
FILE_READERS: dict[str, FileReader] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}


def _read_hf(name: str, corpus: CorpusSection) -> Iterator[Document]:
    path = required_path(name, corpus)
    try:
        import datasets
    except ImportError:
        raise missing_library(name, "kind", corpus.kind, "datasets") from None
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
    "text": _read_files,
    "jsonl": _read_files,
    "parquet": _read_files,
    "files": _read_files,
    "hf": _read_hf,
}
