"""Shards that Megatron's own tools wrote (``*_text_document.bin`` and ``.idx``), used in place.

Nothing is copied: the folder of the domain holds ``meta.json`` and the numbers of the sequences of
either side (``train.npy``, ``heldout.npy``; int64, counted over all datasets). The datasets say
nothing about their tokenizer, so all tokens are looked at once: their ids must be in the vocabulary
of ``data.tokenizer``, and most documents of each dataset must end and begin as ``data.eod`` and
``data.bos`` say. Not all: a tool may have cut a long document in two.
"""

from __future__ import annotations

import glob
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamask.config import Config, CorpusSection
from megamask.data.bos import before_document
from megamask.data.shards import SPLITS, describe_file, read_shards
from megamask.data.split import split_documents
from megamask.data.text_files import files_below, looked_up
from megamask.data.token_index import TokenIndex, bin_file, idx_file, read_index
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ArtifactError, ConfigError, MegamaskError
from megamask.storage import file_sha256


@dataclass(frozen=True)
class TokenDocument:
    """A document of a dataset.

    Attributes:
        dataset: the number of the dataset.
        key: its tokens as little-endian int32; their hash decides the side.
        sequences: the numbers of its sequences, counted over all datasets.
        tokens: how many tokens it has.
        smallest, largest: its ids.
        first, last: the ids at its ends.
    """

    dataset: int
    key: bytes
    sequences: range
    tokens: int
    smallest: int
    largest: int
    first: int
    last: int


@dataclass
class Ends:
    """How the documents of a dataset begin and end.

    Attributes:
        documents: how many documents there are.
        begin: how many of them begin with the BOS.
        end: how many of them end with the EOD.
    """

    documents: int = 0
    begin: int = 0
    end: int = 0


def prefixes(name: str, corpus: CorpusSection) -> list[Path]:
    """The datasets that ``data.domains.<name>.path`` means, sorted: paths without ``.bin`` and
    ``.idx``. The setting is such a path, one of the two files, a glob of either, or a folder.

    Raises:
        ConfigError: there is no dataset, or ``max_bytes`` or ``join`` is set, which are about text.
    """
    path = looked_up(name, corpus)
    for setting, fix in (("max_bytes", "Name fewer shards."), ("join", "Leave it out.")):
        if (value := getattr(corpus, setting)) is not None:
            allowed = f"null for kind megatron: {setting} is about text, and the shards hold tokens"
            raise ConfigError(f"data.domains.{name}.{setting}", value, allowed, fix)
    if path.is_dir():
        matches = [str(file) for file in files_below(path) if file.suffix == ".idx"]
    elif literal := [one for one in (str(path), f"{path}.idx") if Path(one).is_file()]:
        matches = literal  # whatever a glob makes of the letters in its name
    else:
        matches = glob.glob(str(path), recursive=True) + glob.glob(f"{path}.idx", recursive=True)
    ends = (".idx", ".bin")
    found = sorted({Path(match[:-4]) for match in matches if match.endswith(ends)})
    if not found:
        allowed = "the path of a dataset without .bin and .idx, a glob or a folder of datasets"
        key = f"data.domains.{name}.path"
        raise ConfigError(key, corpus.path, f"{allowed}; none is there", "Correct the path.")
    return found


def stamp(name: str, corpus: CorpusSection) -> list[Any]:
    """Facts that change when the datasets change although no setting did. Raises as
    :func:`prefixes`.
    """
    files = [place(one) for one in prefixes(name, corpus) for place in (bin_file, idx_file)]
    return [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else str(file)
        for file in files
    ]


def check(config: Config, name: str, tokenizer: TextTokenizer) -> None:
    """Check everything that needs no look at the tokens.

    Raises:
        ConfigError: see :func:`prefixes`.
        ArtifactError: a broken index, or shards of this package of another tokenizer.
    """
    for prefix in prefixes(name, config.data.domains[name]):
        read_index(prefix, _fix(name))
        _check_note(prefix, tokenizer)


def write(config: Config, name: str, tokenizer: TextTokenizer, folder: Path) -> dict[str, Any]:
    """Look at all tokens, and write the numbers of the sequences of both sides into ``folder``.

    Returns:
        The part of meta.json that describes the datasets and both sides.

    Raises:
        ConfigError, ArtifactError: see :func:`check`; ids outside of the vocabulary, or documents
            of a dataset most of which do not end or begin as the settings say.
    """
    corpus = config.data.domains[name]
    indices = [read_index(prefix, _fix(name)) for prefix in prefixes(name, corpus)]
    numbers = {split: array("q") for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0, "largest_id": -1} for split in SPLITS}
    ends = [Ends() for _ in indices]
    for side, document in split_documents(_documents(indices, name, tokenizer), corpus.heldout):
        numbers[side].extend(document.sequences)
        count = counts[side]
        count["documents"] += 1
        count["tokens"] += document.tokens
        count["largest_id"] = max(count["largest_id"], document.largest)
        found = ends[document.dataset]
        found.documents += 1
        found.begin += document.first == tokenizer.bos
        found.end += document.last == tokenizer.eod
    for index, found in zip(indices, ends, strict=True):
        if found.documents:
            _check_ends(bin_file(index.prefix), found, tokenizer)
            _check_begins(bin_file(index.prefix), found, config, tokenizer)
    for split, sequences in numbers.items():
        np.save(folder / f"{split}.npy", np.sort(np.array(sequences, np.int64)))
    return {
        "sources": [_described(index) for index in indices],
        "splits": {
            split: {**counts[split], "files": describe_file(folder / f"{split}.npy")}
            for split in SPLITS
        },
    }


def _documents(
    indices: list[TokenIndex], name: str, tokenizer: TextTokenizer
) -> Iterator[TokenDocument]:
    """The documents with tokens of all datasets, in stored order.

    Raises:
        ArtifactError: an id that the tokenizer does not know.
    """
    before = 0
    for dataset, index in enumerate(indices):
        tokens = index.all_tokens()
        for first, end in zip(index.bounds[:-1].tolist(), index.bounds[1:].tolist(), strict=True):
            pieces = [index.sequence(tokens, number) for number in range(first, end)]
            ids: NDArray[Any] = np.concatenate(pieces) if len(pieces) != 1 else pieces[0]
            if not len(ids):
                continue
            document = TokenDocument(
                dataset,
                ids.astype("<i4").tobytes(),
                range(before + first, before + end),
                len(ids),
                int(ids.min()),
                int(ids.max()),
                int(ids[0]),
                int(ids[-1]),
            )
            if document.smallest < 0 or document.largest >= tokenizer.vocab_size:
                wrong = document.smallest if document.smallest < 0 else document.largest
                known = f"the tokenizer {tokenizer.name} knows the ids below {tokenizer.vocab_size}"
                fix = f"Set data.tokenizer to the tokenizer of these shards, or {_fix(name)[8:]}"
                problem = f"holds the token id {wrong}, {known}"
                raise ArtifactError(bin_file(index.prefix), problem, fix)
            tokenizer.check_ids(document.largest, bin_file(index.prefix))
            yield document
        before += len(index.lengths)


def _check_ends(place: Path, found: Ends, tokenizer: TextTokenizer) -> None:
    if tokenizer.eod is not None and 2 * found.end <= found.documents:
        problem = (
            f"has {found.end} of {found.documents} documents that end with the token "
            f"{tokenizer.eod} of data.eod, which asks for most"
        )
        fix = (
            "Set data.tokenizer to the tokenizer of these shards, data.eod to their token at the "
            "end of a document, or data.eod=null if they have none."
        )
        raise ArtifactError(place, problem, fix)


def _check_begins(place: Path, found: Ends, config: Config, tokenizer: TextTokenizer) -> None:
    wanted, most = bool(before_document(config, tokenizer)), 2 * found.begin > found.documents
    if tokenizer.bos is not None and wanted != most:
        asks = "asks for most" if wanted else "asks for no more than half"
        problem = (
            f"has {found.begin} of {found.documents} documents that begin with the BOS "
            f"{tokenizer.bos}, and data.bos={config.data.bos} {asks}"
        )
        fix = f"Set data.bos={'false' if wanted else 'true'}, or write the shards again."
        raise ArtifactError(place, problem, fix)


def _check_note(prefix: Path, tokenizer: TextTokenizer) -> None:
    """Check the tokenizer of shards that this package wrote, which say it in their meta.json.

    Raises:
        ArtifactError: another tokenizer made them.
    """
    try:
        made_by = read_shards(prefix.parent).meta["tokenizer"]
    except MegamaskError:
        return  # the shards are from elsewhere
    if made_by["fingerprint"] != tokenizer.fingerprint:
        problem = f"was made with the tokenizer {made_by['name']}, not with {tokenizer.name}"
        raise ArtifactError(bin_file(prefix), problem, "Set data.tokenizer to the first.")


def _described(index: TokenIndex) -> dict[str, Any]:
    files = {
        suffix: {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for suffix, file in (
            (".bin", bin_file(index.prefix)),
            (".idx", idx_file(index.prefix)),
        )
    }
    return {
        "prefix": str(index.prefix.absolute()),
        "sequences": len(index.lengths),
        "tokens": index.tokens,
        "files": files,
    }


def _fix(name: str) -> str:
    return f"Correct data.domains.{name}.path, or write the shards again."
