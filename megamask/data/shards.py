"""Token shards on disk.

Each domain has one folder with {train,heldout}.bin/.idx (Megatron's indexed dataset) and meta.json.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megamask.config import Config, run_paths
from megamask.data.bos import before_document
from megamask.data.noted_corpus import check_noted
from megamask.data.split import HELDOUT, TRAIN
from megamask.data.token_index import TokenIndex, read_index
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ArtifactError, ConfigError
from megamask.storage import file_sha256, lacks, read_object

FORMAT = 1
SPLITS = (TRAIN, HELDOUT)
SUFFIXES = (".bin", ".idx")
TOKENIZE = "Run the verb tokenize."
TOKENIZE_AGAIN = "Delete the folder and run the verb tokenize again."
# For files of the user, which shards in place name: nobody is told to delete them.
SOURCE_CHANGED = "Restore the file, or run the verb tokenize again."


TOKEN_TYPES = ("uint16", "int32")  # of Megatron's indexed datasets, for ids of any vocabulary
_FILE = {"size": int, "sha256": str}


def _required(suffixes: tuple[str, ...], more: dict[str, Any]) -> dict[str, Any]:
    """What meta.json holds, among other things."""
    counts = {"documents": int, "tokens": int, "largest_id": int}
    return {
        "settings_sha256": str,
        "tokenizer": {"name": str, "fingerprint": str},
        "splits": {
            split: {**counts, "files": {f"{split}{suffix}": _FILE for suffix in suffixes}}
            for split in SPLITS
        },
        **more,
    }


META = _required(SUFFIXES, {"dtype": str})
META_IN_PLACE = _required((".npy",), {"sources": list})
SOURCE = {  # a dataset that is used in place
    **{"prefix": str, "sequences": int, "tokens": int},
    "files": {suffix: _FILE for suffix in SUFFIXES},
}


@dataclass(frozen=True)
class Part:
    """The sequences of one indexed dataset that belong to a split.

    Attributes:
        index: the checked index of the dataset.
        sequences: numbers of the sequences, ascending, int32.
    """

    index: TokenIndex
    sequences: NDArray[np.int32]

    @property
    def tokens(self) -> int:
        """How many tokens the sequences hold."""
        return int(self.index.lengths[self.sequences].sum(dtype=np.int64))


@dataclass(frozen=True)
class Shards:
    """The verified shards of one domain; ``meta`` is its meta.json."""

    folder: Path
    meta: dict[str, Any]
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES  # of the files of a split

    def tokens(self, split: str) -> int:
        """How many tokens a split holds."""
        return int(self.meta["splits"][split]["tokens"])

    @property
    def begin_with_bos(self) -> bool:
        """Whether each document begins with a BOS."""
        return self.meta.get("prepend_bos") is True

    def digests(self, split: str) -> list[str]:
        """SHA-256 of the split's files."""
        files = self.meta["splits"][split]["files"]
        return [files[split + suffix]["sha256"] for suffix in self.suffixes]

    def content_sha256(self, split: str) -> str:
        """One SHA-256 for all tokens of the split."""
        return hashlib.sha256(" ".join(self.digests(split)).encode()).hexdigest()

    def parts(self, split: str) -> list[Part]:
        """The sequences of a split.

        Raises:
            ArtifactError: an index is broken, or holds other sequences than were written.
        """
        index = read_index(self.folder / split, TOKENIZE_AGAIN)
        written = self.meta["splits"][split]
        found = (index.dtype.name, len(index.lengths), index.tokens, len(index.all_tokens()))
        noted = (self.meta["dtype"], written["documents"], written["tokens"], written["tokens"])
        if found != noted:
            problem = "holds other sequences than meta.json beside it was written for"
            raise ArtifactError(self.folder / f"{split}.idx", problem, TOKENIZE_AGAIN)
        return [Part(index, np.arange(len(index.lengths), dtype=np.int32))]

    def stream(self, split: str, limit: int | None = None) -> NDArray[np.int64]:
        """The first ``limit`` tokens of a split in stored order, one-dimensional; all without it.

        Raises:
            ArtifactError: see :meth:`parts`; or a token is larger than any that was written.
        """
        pieces, left = [np.empty(0, np.int64)], sys.maxsize if limit is None else limit
        for part in self.parts(split):
            tokens = part.index.all_tokens()
            for number in part.sequences:
                pieces.append(part.index.sequence(tokens, int(number))[:left])
                left -= len(pieces[-1])
                if left <= 0:
                    break
        stream = np.concatenate(pieces, dtype=np.int64)
        if len(stream):
            self.check_ids(split, int(stream.min()), int(stream.max()))
        return stream

    def check_ids(self, split: str, smallest: int, largest: int) -> None:
        """Check token ids against the largest id that was written.

        Raises:
            ArtifactError: an id is negative or larger, so the file was changed afterwards.
        """
        written = int(self.meta["splits"][split]["largest_id"])
        if smallest < 0 or largest > written:
            wrong = smallest if smallest < 0 else largest
            problem = f"holds the token id {wrong}, the largest that was written is {written}"
            place = self.folder / f"{split}.bin"
            raise ArtifactError(place if place.exists() else self.folder, problem, TOKENIZE_AGAIN)


class ShardsInPlace(Shards):
    """Shards that are sequences of datasets elsewhere (:mod:`megamask.data.in_place`)."""

    suffixes: ClassVar[tuple[str, ...]] = (".npy",)

    def digests(self, split: str) -> list[str]:
        """SHA-256 of the numbers of the split's sequences, and of all files of the datasets."""
        files = [source["files"][suffix] for source in self.meta["sources"] for suffix in SUFFIXES]
        return super().digests(split) + [file["sha256"] for file in files]

    def parts(self, split: str) -> list[Part]:
        """The sequences of a split, by dataset. Raises as in the base class."""
        numbers, before, parts = self._numbers(split), 0, []
        for source in self.meta["sources"]:
            index = read_index(Path(source["prefix"]), SOURCE_CHANGED)
            if (len(index.lengths), index.tokens) != (source["sequences"], source["tokens"]):
                problem = f"holds other sequences than {self.folder} was written for"
                raise ArtifactError(f"{source['prefix']}.idx", problem, SOURCE_CHANGED)
            first, end = np.searchsorted(numbers, [before, before + len(index.lengths)])
            parts.append(Part(index, (numbers[first:end] - before).astype(np.int32)))
            before += len(index.lengths)
        known = len(numbers) == 0 or (numbers[0] >= 0 and numbers[-1] < before)
        if not known or sum(part.tokens for part in parts) != self.tokens(split):
            problem = "holds other sequences than meta.json beside it was written for"
            raise ArtifactError(self.folder / f"{split}.npy", problem, TOKENIZE_AGAIN)
        return parts

    def _numbers(self, split: str) -> NDArray[np.int64]:
        """The numbers of the split's sequences, counted over all datasets, ascending."""
        file = self.folder / f"{split}.npy"
        try:
            numbers = np.load(file, allow_pickle=False)
        except Exception as error:  # whatever numpy raises over a torn or hostile file
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            problem = f"cannot be read as an array of numbers ({reason})"
            raise ArtifactError(file, problem, TOKENIZE_AGAIN) from error
        plain = isinstance(numbers, np.ndarray) and numbers.dtype == np.int64 and numbers.ndim == 1
        if not plain or (numbers[1:] <= numbers[:-1]).any():
            problem = "holds something else than ascending numbers"
            raise ArtifactError(file, problem, TOKENIZE_AGAIN)
        found: NDArray[np.int64] = numbers
        return found


def open_shards(config: Config, domain: str, split: str, tokenizer: TextTokenizer) -> Shards:
    """Open a domain's shards for reading ``split``.

    Raises:
        ConfigError: ``domain`` is not in data.domains, or its shards were made from other documents
            or hold out another share (:func:`megamask.data.noted_corpus.check_noted`).
        ArtifactError: the shards are missing or torn, another tokenizer, ``data.bos`` or
            ``data.eod`` made them, or ``split`` holds no token.
    """
    if domain not in config.data.domains:
        raise ConfigError(
            "data.domains",
            domain,
            f"one of {', '.join(config.data.domains) or 'nothing yet'}",
            "Add it to data.domains.",
        )
    shards = read_shards(run_paths(config).shards / domain)
    check_noted(domain, config.data.domains[domain], shards.meta, shards.folder)
    made_by = shards.meta["tokenizer"]
    if made_by["fingerprint"] != tokenizer.fingerprint:
        problem = (
            f"was made with the tokenizer {made_by['name']}, which differs from {tokenizer.name}"
        )
        raise ArtifactError(
            shards.folder, problem, "Set data.tokenizer to the first, or run the verb tokenize."
        )
    begin = before_document(config, tokenizer)
    if bool(begin) != shards.begin_with_bos:
        state = "begin with a BOS" if shards.begin_with_bos else "do not begin with a BOS"
        problem = f"has documents that {state}; data.bos={config.data.bos} asks for the contrary"
        word = "true" if shards.begin_with_bos else "false"
        fix = f"Run the verb tokenize, or set data.bos={word}."
        raise ArtifactError(shards.folder, problem, fix)
    _check_ends(shards, tokenizer)
    if shards.tokens(split) == 0:
        raise ArtifactError(
            shards.folder, f"has no {split} text", _more_text(shards, domain, split)
        )
    return shards


def read_shards(folder: Path) -> Shards:
    """Read and check a shard folder, whatever tokenizer made it.

    Raises:
        ArtifactError: a file is missing, has another size than was written, or has another format.
    """
    meta = read_object(folder / "meta.json", TOKENIZE, {"format": int})
    if meta["format"] != FORMAT:
        raise ArtifactError(
            folder / "meta.json", f"is not of shard format {FORMAT}", TOKENIZE_AGAIN
        )
    in_place = "sources" in meta
    if problem := lacks(meta, META_IN_PLACE if in_place else META):
        raise ArtifactError(folder / "meta.json", problem, TOKENIZE_AGAIN)
    for split in SPLITS:
        for file, described in meta["splits"][split]["files"].items():
            if file in {f"{split}{suffix}" for suffix in (*SUFFIXES, ".npy")}:
                _check_size(folder / file, described["size"], TOKENIZE_AGAIN)
    for source in meta["sources"] if in_place else ():
        if problem := lacks(source, SOURCE):
            raise ArtifactError(folder / "meta.json", f"{problem} in sources", TOKENIZE_AGAIN)
        for suffix in SUFFIXES:
            place, size = Path(source["prefix"] + suffix), source["files"][suffix]["size"]
            _check_size(place, size, SOURCE_CHANGED)
    if not in_place and meta["dtype"] not in TOKEN_TYPES:
        problem = f"names the dtype {meta['dtype']!r}, tokens have one of {', '.join(TOKEN_TYPES)}"
        raise ArtifactError(folder / "meta.json", problem, TOKENIZE_AGAIN)
    return ShardsInPlace(folder, meta) if in_place else Shards(folder, meta)


def describe_file(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of a file that was written."""
    return {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}}


def check_vocabulary(config: Config, vocab: int) -> None:
    """Check that the shards of every domain hold only token ids that the model knows.

    Args:
        config: names the domains and the run directory.
        vocab: size of the model's vocabulary; every token id must be below it.

    Raises:
        ArtifactError: shards hold a larger id, or they are missing or torn.
    """
    for domain in config.data.domains:
        shards = read_shards(run_paths(config).shards / domain)
        largest = max(split.get("largest_id", -1) for split in shards.meta["splits"].values())
        if largest >= vocab:
            problem = f"holds the token id {largest}, the model knows {vocab} ids"
            raise ArtifactError(
                shards.folder,
                problem,
                "Set data.tokenizer to the tokenizer of the model and run the verb tokenize.",
            )


def _check_size(file: Path, size: int, fix: str) -> None:
    if not file.is_file():
        raise ArtifactError(file, "is missing", TOKENIZE)
    size_now = file.stat().st_size
    if size_now != size:
        state = "truncated" if size_now < size else "overwritten"
        problem = f"is {state}: {size_now} bytes, {size} were written"
        raise ArtifactError(file, problem, fix)


def _check_ends(shards: Shards, tokenizer: TextTokenizer) -> None:
    """Check the ids at the ends of documents, which the fingerprint of a tokenizer leaves out.

    Shards that do not note an id are taken as they are.

    Raises:
        ArtifactError: the shards note another id.
    """
    noted = dict(shards.meta["tokenizer"])
    if shards.meta.get("append_eod") is False:  # the settings of 0.1.0 noted an EOD all the same
        noted["eod"] = None
    ends = [("eod", "end with", "data.eod")]
    if shards.begin_with_bos:
        ends.append(("bos", "begin with", "the BOS of data.tokenizer"))
    for key, place, setting in ends:
        wanted = getattr(tokenizer, key)
        if (written := noted.get(key, wanted)) != wanted:
            problem = f"has documents that {place} {_token(written)}"
            problem = f"{problem}; {setting} is {_token(wanted)} now"
            fix = f"Run the verb tokenize, or set {setting} as it was."
            raise ArtifactError(shards.folder, problem, fix)


def _token(number: object) -> str:
    return "no token" if number is None else f"the token {number}"


def _more_text(shards: Shards, domain: str, split: str) -> str:
    if sum(count["documents"] for count in shards.meta["splits"].values()) == 1:
        return (
            f"{domain} is one document (data.domains.{domain}.join makes one of many), which is "
            "either learned from or held out whole. Give it two documents or more and run the verb "
            "tokenize, or add a domain for the other side."
        )
    direction = "Raise" if split == HELDOUT else "Lower"
    return (
        f"{direction} data.domains.{domain}.heldout, or give the domain two documents or more, "
        "and run the verb tokenize."
    )
