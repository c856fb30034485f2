"""Text domains to token shards, split into training and held-out documents."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamask.config import Config, CorpusSection, run_paths
from megamask.data import in_place
from megamask.data.bos import before_document
from megamask.data.corpora import Document, documents, files_left_out, source_stamp
from megamask.data.shards import FORMAT, SPLITS, Shards, describe_file, read_shards
from megamask.data.split import split_documents
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ArtifactError
from megamask.storage import atomic_dir, write_json

# Text that the tokenizer gets at once; it works on the documents of a batch in parallel.
BATCH_CHARACTERS = 2**20


def settings_digest(config: Config, name: str, tokenizer: TextTokenizer) -> str:
    """Hash over everything that decides the shards of a domain."""
    corpus = config.data.domains[name]
    deciding = [
        FORMAT,
        # A setting that came later decides only where it is set, so older shards stay current.
        {
            key: value
            for key, value in corpus.model_dump().items()
            if (key, value) != ("join", None)
        },
        _writer(corpus).stamp(name, corpus),
        tokenizer.fingerprint,
        _end(config, tokenizer),
    ]
    if begin := before_document(config, tokenizer):
        deciding.append(begin)
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _end(config: Config, tokenizer: TextTokenizer) -> list[int]:
    return [tokenizer.eod] if tokenizer.eod is not None else []


def is_current(folder: Path, digest: str) -> bool:
    """Whether the shards in ``folder`` are whole and were made with the settings of ``digest``."""
    try:
        return bool(read_shards(folder).meta["settings_sha256"] == digest)
    except ArtifactError:
        return False


def write_domain(config: Config, name: str, tokenizer: TextTokenizer, digest: str) -> None:
    """Tokenize a domain and write its shard folder, ``meta.json`` included.

    Raises:
        ConfigError, ArtifactError: see :func:`megamask.data.corpora.documents` and
            :func:`megamask.data.in_place.write`.
    """
    with atomic_dir(run_paths(config).shards / name) as folder:
        corpus = config.data.domains[name]
        meta = {
            "format": FORMAT,
            "domain": name,
            "settings_sha256": digest,
            "corpus": corpus.model_dump(),
            "append_eod": tokenizer.eod is not None,
            "prepend_bos": bool(before_document(config, tokenizer)),
            "tokenizer": {
                key: getattr(tokenizer, key)
                for key in ("name", "fingerprint", "vocab_size", "eod", "bos")
            },
            **_writer(corpus).write(config, name, tokenizer, folder),
        }
        write_json(folder / "meta.json", meta)


def check_domain(config: Config, name: str, tokenizer: TextTokenizer) -> None:
    """Check what can be refused before any domain is written.

    Raises:
        ConfigError, ArtifactError: see :func:`write_domain`.
    """
    _writer(config.data.domains[name]).check(config, name, tokenizer)


@dataclass(frozen=True)
class Writer:
    """How the shards of a kind of corpus are made.

    Attributes:
        stamp: facts that change when the source changes although no setting did.
        check: refuses what can be refused early.
        write: writes the files of the folder that it is given; returns a part of meta.json.
    """

    stamp: Callable[[str, CorpusSection], list[Any]]
    check: Callable[[Config, str, TextTokenizer], None]
    write: Callable[[Config, str, TextTokenizer, Path], dict[str, Any]]


def _writer(corpus: CorpusSection) -> Writer:
    return WRITERS.get(corpus.kind, TEXT)


def _check_text(config: Config, name: str, tokenizer: TextTokenizer) -> None:
    """Read the first document, which shows the errors of the settings of a corpus."""
    next(iter(documents(name, config.data.domains[name])))


def _write_text(
    config: Config, name: str, tokenizer: TextTokenizer, folder: Path
) -> dict[str, Any]:
    corpus = config.data.domains[name]
    if left_out := files_left_out(name, corpus):
        shown = ", ".join(str(file) for file in left_out[:3])
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        say(f"{name}: not read, for these are no {corpus.kind} files of the corpus: {shown}{more}")
    dtype = _token_type(tokenizer.vocab_size)
    sided = split_documents(documents(name, corpus), corpus.heldout)
    begin, end = before_document(config, tokenizer), _end(config, tokenizer)
    counts = _write_tokens(folder, name, dtype, sided, tokenizer, begin, end)
    described = {
        split: describe_file(folder / f"{split}.bin") | describe_file(folder / f"{split}.idx")
        for split in SPLITS
    }
    return {
        "dtype": dtype.name,
        "splits": {split: {**counts[split], "files": described[split]} for split in SPLITS},
    }


TEXT = Writer(source_stamp, _check_text, _write_text)
WRITERS = {"megatron": Writer(in_place.stamp, in_place.check, in_place.write)}


def _token_type(vocab_size: int) -> np.dtype[Any]:
    from megatron.core.datasets.indexed_dataset import DType

    dtype: np.dtype[Any] = np.dtype(DType.optimal_dtype(vocab_size))
    return dtype


def _write_tokens(
    folder: Path,
    name: str,
    dtype: np.dtype[Any],
    sided: Iterable[tuple[str, Document]],
    tokenizer: TextTokenizer,
    begin: list[int],
    end: list[int],
) -> dict[str, dict[str, int]]:
    """Tokenize and write the documents of both sides.

    Returns:
        Side -> number of documents, tokens and bytes of text, and the largest token id.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builders: dict[str, Any] = {
        split: IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=dtype.type)
        for split in SPLITS
    }
    counts = {
        split: {"documents": 0, "tokens": 0, "bytes": 0, "largest_id": -1} for split in SPLITS
    }
    started = time.monotonic()
    for batch in _batches(sided):
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
        for (split, document), ids in zip(batch, encoded, strict=True):
            ids = begin + ids + end
            if not ids:
                continue
            builders[split].add_document(ids, [len(ids)])
            count = counts[split]
            count["documents"] += 1
            count["tokens"] += len(ids)
            count["bytes"] += len(document.text.encode())
            count["largest_id"] = max(count["largest_id"], *ids)
            tokenizer.check_ids(count["largest_id"], tokenizer.name)
        _say_progress(name, counts, time.monotonic() - started)
    for split, builder in builders.items():
        builder.finalize(str(folder / f"{split}.idx"))
    return counts


def _batches(sided: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch: list[tuple[str, Document]] = []
    size = 0
    for side, document in sided:
        batch.append((side, document))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def say(line: str, end: str = "\n") -> None:
    """Write a line to stderr."""
    print(line, file=sys.stderr, end=end, flush=True)


def _say_progress(name: str, counts: dict[str, dict[str, int]], seconds: float) -> None:
    if sys.stderr.isatty():
        megabytes = sum(count["bytes"] for count in counts.values()) / 1e6
        tokens = sum(count["tokens"] for count in counts.values())
        speed = megabytes / max(seconds, 1e-9)
        say(f"{name}: {megabytes:.1f} MB, {tokens:,} tokens, {speed:.1f} MB/s   ", end="\r")


def summary(name: str, shards: Shards, state: str) -> str:
    """A line with the documents and tokens of both sides of a domain."""
    sides = []
    for split in SPLITS:
        count = shards.meta["splits"][split]["documents"]
        sides.append(f"{count:,} {split} documents, {shards.tokens(split):,} tokens")
    return f"{name}: {state}; {'; '.join(sides)}"
