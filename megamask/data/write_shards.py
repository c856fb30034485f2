"""The verb ``tokenize``: text domains -> token shards, split into training and held-out
documents.
"""

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
from megamask.data.corpora import Document, documents, source_stamp
from megamask.data.shards import FORMAT, SPLITS, SUFFIXES, Shards, read_shards
from megamask.data.split import split_documents
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ArtifactError
from megamask.storage import atomic_dir, write_json

BATCH_CHARACTERS = (
    2**20
)  # text handed to the tokenizer at once; it works on a batch's documents in parallel


def _settings_digest(config: Config, name: str, tokenizer: TextTokenizer) -> str:
    """Hash of all that decides a domain's shards."""
    corpus = config.data.domains[name]
    deciding = [
        FORMAT,
        corpus.model_dump(),
        source_stamp(name, corpus),
        tokenizer.fingerprint,
        _end(config, tokenizer),
    ]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _end(config: Config, tokenizer: TextTokenizer) -> list[int]:
    return [tokenizer.eod] if config.data.append_eod and tokenizer.eod is not None else []


def _is_current(folder: Path, digest: str) -> bool:
    try:
        return bool(read_shards(folder).meta["settings_sha256"] == digest)
    except ArtifactError:
        return False


def _write_domain(config: Config, name: str, tokenizer: TextTokenizer, digest: str) -> None:
    corpus = config.data.domains[name]
    with atomic_dir(run_paths(config).shards / name) as folder:
        dtype = _token_type(tokenizer.vocab_size)
        sided = split_documents(documents(name, corpus), corpus.heldout)
        counts = _write_tokens(folder, name, dtype, sided, tokenizer, _end(config, tokenizer))
        meta = {
            "format": FORMAT,
            "domain": name,
            "settings_sha256": digest,
            "corpus": corpus.model_dump(),
            "dtype": dtype.name,
            "append_eod": config.data.append_eod,
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

    return np.dtype(DType.optimal_dtype(vocab_size))


def _write_tokens(
    folder: Path,
    name: str,
    dtype: np.dtype[Any],
    sided: Iterable[tuple[str, Document]],
    tokenizer: TextTokenizer,
    end: list[int],
) -> dict[str, dict[str, int]]:
    """Tokenize and write the documents of both sides; returns documents, tokens and bytes of text
    per side.
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
        for (split, document), ids in zip(
            batch, tokenizer.encode_batch([document.text for _, document in batch]), strict=True
        ):
            ids = ids + end
            if not ids:
                continue
            builders[split].add_document(ids, [len(ids)])
            for key, more in (
                ("documents", 1),
                ("tokens", len(ids)),
                ("bytes", len(document.text.encode())),
            ):
                counts[split][key] += more
            counts[split]["largest_id"] = max(counts[split]["largest_id"], *ids)
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
        described[file.name] = {"size": file.stat().st_size, "sha256": _hash_file(file)}
    return described


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _say(line: str, end: str = "\n") -> None:
    print(line, file=sys.stderr, end=end, flush=True)


def _say_progress(name: str, counts: dict[str, dict[str, int]], seconds: float) -> None:
    if sys.stderr.isatty():
        megabytes, tokens = (
            sum(count[key] for count in counts.values()) for key in ("bytes", "tokens")
        )
        _say(
            f"{name}: {megabytes / 1e6:.1f} MB, {tokens:,} tokens, {megabytes / 1e6 / max(seconds, 1e-9):.1f} MB/s   ",
            end="\r",
        )


def _summary(name: str, shards: Shards, state: str) -> str:
    sides = (
        f"{shards.meta['splits'][split]['documents']:,} {split} documents, {shards.tokens(split):,} tokens"
        for split in SPLITS
    )
    return f"{name}: {state}; {'; '.join(sides)}"
