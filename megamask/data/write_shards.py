"""Text domains to token shards, split into training and held-out documents."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamask.config import Config, CorpusSection, run_paths
from megamask.data import in_place
from megamask.data.bos import before_document
from megamask.data.corpora import documents, files_left_out, source_stamp
from megamask.data.document import START, Document, Reached
from megamask.data.encoders import Tokens, encoded, encoder
from megamask.data.shards import FORMAT, SPLITS, Shards, describe_file, read_shards
from megamask.data.split import SplitState, split_documents
from megamask.data.token_files import TokenFiles, is_useful, take_up
from megamask.data.token_index import token_type
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ArtifactError
from megamask.process.cores import usable_cores
from megamask.storage import continued_dir, write_json

BATCH_CHARACTERS = 2**18  # text of a batch, which one process tokenizes
NOTE_EVERY = 2**24  # bytes of text after which the end of a file is noted: some seconds of work


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
    with continued_dir(run_paths(config).shards / name, is_useful) as folder:
        take_up(folder, digest)
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
            **_writer(corpus).write(config, name, tokenizer, folder, digest),
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
        write: writes the files of the folder that it is given, for settings of the digest that it
            is given; returns a part of meta.json.
    """

    stamp: Callable[[str, CorpusSection], list[Any]]
    check: Callable[[Config, str, TextTokenizer], None]
    write: Callable[[Config, str, TextTokenizer, Path, str], dict[str, Any]]


def _writer(corpus: CorpusSection) -> Writer:
    return WRITERS.get(corpus.kind, TEXT)


def _check_text(config: Config, name: str, tokenizer: TextTokenizer) -> None:
    """Read the first document, which shows the errors of the settings of a corpus."""
    next(iter(documents(name, config.data.domains[name])))


def _write_text(
    config: Config, name: str, tokenizer: TextTokenizer, folder: Path, digest: str
) -> dict[str, Any]:
    corpus = config.data.domains[name]
    if left_out := files_left_out(name, corpus):
        shown = ", ".join(str(file) for file in left_out[:3])
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        say(f"{name}: not read, for these are no {corpus.kind} files of the corpus: {shown}{more}")
    dtype = token_type(tokenizer.vocab_size)
    encode = encoder(
        tokenizer.encode_batch, dtype, before_document(config, tokenizer), _end(config, tokenizer)
    )
    with TokenFiles(folder, dtype, digest) as files:
        reached = files.progress.reached
        if reached.files:
            say(f"{name}: goes on after {reached.files:,} files, {reached.size / 1e6:,.1f} MB")
        started = time.monotonic()
        batches = _batches(name, corpus, reached)
        for batch, tokens in encoded(encode, batches, _processes(config), name):
            _add(files, batch, tokens)
            largest = max(count["largest_id"] for count in files.progress.counts.values())
            tokenizer.check_ids(largest, tokenizer.name)
            if batch.reached is not None:
                files.note(batch.reached)
            _say_progress(name, files.progress.counts, time.monotonic() - started)
        files.finish()
    described = {
        split: describe_file(folder / f"{split}.bin") | describe_file(folder / f"{split}.idx")
        for split in SPLITS
    }
    counts = files.progress.counts
    return {
        "dtype": dtype.name,
        "splits": {split: {**counts[split], "files": described[split]} for split in SPLITS},
    }


def _processes(config: Config) -> int:
    return config.data.processes or len(usable_cores())


def _write_in_place(
    config: Config, name: str, tokenizer: TextTokenizer, folder: Path, _digest: str
) -> dict[str, Any]:
    return in_place.write(config, name, tokenizer, folder)


TEXT = Writer(source_stamp, _check_text, _write_text)
WRITERS = {"megatron": Writer(in_place.stamp, in_place.check, _write_in_place)}


@dataclass(frozen=True)
class Batch:
    """Documents that are tokenized at once.

    Attributes:
        documents: side and document.
        reached: how far the corpus was read with the last document, where that is to be noted.
    """

    documents: list[tuple[str, Document]]
    reached: Reached | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return [document.text for _, document in self.documents]


def _batches(name: str, corpus: CorpusSection, after: Reached) -> Iterator[Batch]:
    """The documents of a corpus that come after ``after``. A place is noted at the end of a file,
    and only when no document waits for its side.
    """
    state = SplitState(settled=after != START)
    documents_left = documents(name, corpus, after)
    batch: list[tuple[str, Document]] = []
    characters, size, noted, file = 0, after.size, after.size, after.files
    for side, document in split_documents(documents_left, corpus.heldout, state):
        if state.settled and document.file > file and size - noted >= NOTE_EVERY:
            yield Batch(batch, Reached(document.file, size))
            batch, characters, noted = [], 0, size
        file = max(file, document.file)
        batch.append((side, document))
        size += document.size
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield Batch(batch)
            batch, characters = [], 0
    if batch:
        yield Batch(batch)


def _add(files: TokenFiles, batch: Batch, tokens: Tokens) -> None:
    """Write the documents of a batch, but for those without a token."""
    sides = np.array([side for side, _ in batch.documents])
    for split in SPLITS:
        chosen = (sides == split) & (tokens.lengths > 0)
        text_bytes = sum(
            document.size
            for (_, document), is_chosen in zip(batch.documents, chosen, strict=True)
            if is_chosen
        )
        ids = tokens.ids[np.repeat(chosen, tokens.lengths)]
        files.add(split, ids, tokens.lengths[chosen], text_bytes)


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
