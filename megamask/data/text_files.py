"""The files that a path means, and their text: names, compressions and encodings as the published
corpora have them.

| corpus | names |
|---|---|
| C4, mC4, Dolma, RedPajama v2 | ``c4-train.00000-of-01024.json.gz``, ``en_head.json.gz`` |
| SlimPajama, The Pile, DCLM, OSCAR | ``example_train_0.jsonl.zst``, ``00.jsonl.zst`` |
| RedPajama | ``en_head_0000.json.gz.dedup.classifier.jsonl.zst``, ``book.jsonl`` |
| FineWeb, The Stack, WikiText | ``000_00000.parquet``, ``train-00000-of-00001.parquet`` |
| a saved ``datasets`` folder | ``data-00000-of-00001.arrow`` beside ``dataset_info.json`` |
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from megamask.config import CorpusSection
from megamask.errors import ArtifactError, ConfigError

# Ending of a name, without the ending of a compression -> format.
FORMATS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".txt", ".text", ".raw"), "text"),
    **{".parquet": "parquet", ".arrow": "arrow"},
}
# Files beside the text of a published corpus, which are no text of it.
NOTES = (
    *("README*", "LICENSE*", "*SUMS*", "*.lock", "requirements.txt", "cache-*.arrow"),
    *("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"),
)
POINTER = b"version https://git-lfs"


def corpus_files(name: str, corpus: CorpusSection) -> tuple[list[Path], list[Path]]:
    """The files that ``data.domains.<name>.path`` means: a file, a glob, or all files of the kind
    below a folder.

    Returns:
        The files with text, sorted, and the files below the folder that are left out.

    Raises:
        ConfigError: the path is not given, cannot be looked up, or matches nothing.
    """
    path = looked_up(name, corpus)
    if path.is_dir():
        found = sorted(file for file in files_below(path) if not _is_hidden(file, path))
        files = [file for file in found if _is_wanted(file, corpus.kind)]
        left_out = [file for file in found if not _is_wanted(file, corpus.kind)]
    else:
        matches = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
        files, left_out = sorted(file for file in matches if file.is_file()), []
    if corpus.kind == "files":
        unknown = [file for file in files if format_of(file) is None]
        if unknown:
            allowed = f"files whose names end in one of {_endings()}; {unknown[0]} does not"
            fix = f"Set data.domains.{name}.kind to the format of the files, or narrow the path."
            raise ConfigError(f"data.domains.{name}.path", corpus.path, allowed, fix)
    if not files:
        allowed = f"a file, folder or glob with {corpus.kind} files; nothing was found there"
        raise ConfigError(f"data.domains.{name}.path", corpus.path, allowed, "Correct the path.")
    return files, left_out


def looked_up(name: str, corpus: CorpusSection) -> Path:
    """The path of a domain, which may be a glob.

    Raises:
        ConfigError: the path is not given or cannot be looked up.
    """
    given = required_path(name, corpus)
    path = Path(given)
    try:
        path.is_dir()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        shown = given if len(given) <= 80 else f"{given[:77]}..."
        allowed = f"a path that can be looked up ({error.__class__.__name__})"
        raise ConfigError(
            f"data.domains.{name}.path", shown, allowed, "Correct the path."
        ) from None
    return path


def required_path(name: str, corpus: CorpusSection) -> str:
    """The path of a domain.

    Raises:
        ConfigError: it is not given.
    """
    if not corpus.path:
        wanted = "a dataset name" if corpus.kind == "hf" else "a file, folder or glob"
        raise ConfigError(
            f"data.domains.{name}.path",
            corpus.path,
            f"kind {corpus.kind} needs {wanted}",
            f"Set data.domains.{name}.path.",
        )
    return corpus.path


def format_of(file: Path) -> str | None:
    """The format that the name of a file says; None where the name says nothing."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSIONS else file
    return FORMATS.get(name.suffix.lower())


def lines(name: str, file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, compressed or not, without a byte order mark.

    A line ends with a line feed alone: a carriage return before it is white space in JSON.

    Raises:
        ArtifactError: the file cannot be read to its end; the message has the last whole line.
        ConfigError: a package for the compression is not installed.
    """
    number = 0
    try:
        with _opened(name, file) as stream:
            for raw in stream:
                number += 1
                if number == 1 and raw.startswith(POINTER):
                    raise ValueError("no text")
                yield raw.decode().lstrip("\ufeff")  # files with marks may have been joined
    except UnicodeDecodeError as error:
        fix = f"Correct it or change data.domains.{name}.path."
        raise ArtifactError(file, f"line {number} is not UTF-8 ({error.reason})", fix) from error
    except BROKEN as error:
        raise unreadable(
            name, file, f"cannot be read to its end, after line {number}", error
        ) from error


def whole_text(name: str, file: Path) -> str:
    """The text of a UTF-8 file, compressed or not, with line feeds at the ends of lines.

    Raises:
        ArtifactError: the file is no UTF-8 text, is broken, or is a pointer of Git LFS.
        ConfigError: a package for the compression is not installed.
    """
    try:
        with io.TextIOWrapper(_opened(name, file), encoding="utf-8-sig") as stream:
            text = stream.read()
            if text.startswith(POINTER.decode()):
                raise ValueError("no text")
            return text
    except UnicodeDecodeError as error:
        fix = f"Narrow data.domains.{name}.path to text files."
        raise ArtifactError(file, f"is not UTF-8 text ({error.reason})", fix) from error
    except BROKEN as error:
        raise unreadable(name, file, "cannot be read to its end", error) from error


def unreadable(name: str, file: Path, problem: str, error: Exception) -> ArtifactError:
    """The error of a file that is cut off, broken, or a pointer to a file that was not fetched."""
    fix = f"Restore the file or change data.domains.{name}.path."
    problem = f"{problem} ({error})"
    try:
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                problem, fix = "is a pointer of Git LFS, not the file", "Run: git lfs pull"
    except OSError:
        pass
    return ArtifactError(file, problem, fix)


def missing_library(name: str, key: str, value: object, library: str) -> ConfigError:
    """The error of a setting ``data.domains.<name>.<key>`` that needs a package."""
    allowed = f"reading it needs the Python package {library}, which is not installed"
    fix = f"Run: pip install {library}"
    return ConfigError(f"data.domains.{name}.{key}", value, allowed, fix)


def _opened(name: str, file: Path) -> BinaryIO:
    opener = COMPRESSIONS.get(file.suffix.lower())
    try:
        return file.open("rb") if opener is None else opener(file)
    except ImportError:
        raise missing_library(name, "path", str(file), "pyarrow") from None


def _open_zstd(file: Path) -> BinaryIO:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
    return io.BufferedReader(stream, 2**20)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
BROKEN = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def _is_wanted(file: Path, kind: str) -> bool:
    if any(fnmatch(file.name, note) for note in NOTES) and kind != "text":
        return False
    return kind == "text" or format_of(file) in ({kind} if kind != "files" else {*FORMATS.values()})


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, links to folders included, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        facts = os.stat(place)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()  # a link to a folder above it, or to one that was read already
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders.sort()
        yield from (file for name in names if (file := Path(place, name)).is_file())


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _endings() -> str:
    return f"{', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)}"
