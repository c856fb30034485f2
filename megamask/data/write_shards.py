"""Text domains to token shards, split into training and held-out documents."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megamask.config import Config, run_paths
from megamask.data.bos import before_document
from megamask.data.corpora import Document, documents, files_left_out, source_stamp
from megamask.data.shards import FORMAT, SPLITS, SUFFIXES, Shards, read_shards
from megamask.data.split import split_documents
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ArtifactError
from megamask.storage import atomic_dir, file_sha256, write_json

# Text that the tokenizer gets at once; it works on the documents of a batch in parallel.
BATCH_CHARACTERS = 2**20


def settings_digest(config: Config, name: str, tokenizer: TextTokenizer) -> str:
    """Hash over everything that decides the shards of a domain."""
    corpus = config.data.domains[name]
    deciding = [
        FORMAT,
        corpus.model_dump(),
        source_stamp(name, corpus),
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
        ConfigError, ArtifactError: see :func:`megamask.data.corpora.documents`.
    """
    corpus = config.data.domains[name]
    if left_out := files_left_out(name, corpus):
        shown = ", ".join(str(file) for file in left_out[:3])
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        say(f"{name}: not read, for these are no {corpus.kind} files of the corpus: {shown}{more}")
    with atomic_dir(run_paths(config).shards / name) as folder:
        dtype = _token_type(tokenizer.vocab_size)
        sided = split_documents(documents(name, corpus), corpus.heldout)
        begin, end = before_document(config, tokenizer), _end(config, tokenizer)
        counts = _write_tokens(folder, name, dtype, sided, tokenizer, begin, end)
        meta = {
            "format": FORMAT,
            "domain": name,
            "settings_sha256": digest,
            "corpus": corpus.model_dump(),
            "dtype": dtype.name,
            "append_eod": tokenizer.eod is not None,
            "prepend_bos": bool(begin),
            "tokenizer": {
                key: getattr(tokenizer, key)
                for key in ("name", "fingerprint", "vocab_size", "eod", "bos")
            },
            "splits": {
                split: {**counts[split], "files": _describe_files(folder, split)}
                for split in SPLITS
            },
        }
        write_json(folder / "meta.json", meta)


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


def _describe_files(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    for file in (folder / f"{split}{suffix}" for suffix in SUFFIXES):
        described[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    return described


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
