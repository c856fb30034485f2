"""WikiText-2 as the scripts of GPTQ, SparseGPT and Wanda measure perplexity on it, so that numbers
compare with published tables.

Those scripts take the raw test part, join its rows with two line feeds and call the tokenizer once
on the whole, which puts one BOS before the text where the tokenizer has that habit. They cut the
ids into windows of L tokens that do not overlap, and drop the tail. In each window the L - 1 tokens
after the first are targets: the first token of a window is never predicted, and context never
crosses into the next window. The perplexity is exp of the mean over windows of the windows' mean
loss; all windows have L - 1 targets, so it is exp of the mean over all targets.

Source: E. Frantar et al., GPTQ (2210.17323) and SparseGPT (2301.00774), M. Sun et al., Wanda
(2306.11695).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megamask.config import Config, CorpusSection
from megamask.data.bos import before_document
from megamask.data.corpora import documents
from megamask.data.text_files import COMPRESSIONS, format_of
from megamask.data.tokenizer import load_tokenizer
from megamask.errors import ArtifactError, ConfigError

NAME = "wikitext2"
BETWEEN_ROWS = "\n\n"
HUB = CorpusSection(
    kind="hf",
    path="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    split="test",
    join=BETWEEN_ROWS,
)
KEY = "evaluate.text"
FILES = "a file with the test part of WikiText-2: its rows as .jsonl, .parquet or .arrow, or all "
FILES += "of it joined by two line feeds as .txt"
FIX = f"Set {KEY} to {FILES}."


@dataclass(frozen=True)
class WikiText:
    """The tokens of a text in windows.

    Attributes:
        windows_NS: N windows of S tokens, int64.
        source: where the text came from.
        sha256: of the text in UTF-8.
        has_bos: whether the first token is a BOS.
    """

    windows_NS: torch.Tensor
    source: str
    sha256: str
    has_bos: bool


def wikitext(config: Config, window: int, vocab: int) -> WikiText:
    """The windows of the text of ``evaluate.text``. ``data.bos`` says whether the tokenizer puts a
    BOS before a text. Names of special tokens in the text are plain text.

    Args:
        config: names the text and the tokenizer.
        window: tokens of a window.
        vocab: the model's vocabulary; every id must be below it.

    Raises:
        ConfigError: the text cannot be read as the setting says, or the tokenizer has no BOS and
            ``data.bos`` wants one.
        ArtifactError: the file is missing, empty, broken or too short for one window; or the model
            does not know an id.
    """
    corpus = _corpus(config.evaluate.text)
    source = str(corpus.path)
    text = _read(corpus, config.evaluate.text)
    tokenizer = replace(load_tokenizer(config), model_vocab=vocab)
    begin = before_document(config, tokenizer)
    ids = [*begin, *tokenizer.encode(text)]
    tokenizer.check_ids(max(ids), tokenizer.name)
    if len(ids) < window:
        problem = f"has {len(ids):,} tokens, too few for one window of {window:,}"
        raise ArtifactError(source, problem, FIX)
    return WikiText(
        windows_NS=cut(ids, window),
        source=source,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        has_bos=bool(begin),
    )


def cut(ids: list[int], window: int) -> torch.Tensor:
    """The ids in windows that do not overlap, without the tail: int64 (N, window)."""
    count = len(ids) // window
    return torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)


def _corpus(given: str | None) -> CorpusSection:
    if given is None:
        return HUB
    path = Path(given).expanduser()
    try:
        is_file, is_there = path.is_file(), path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        is_file = is_there = False
    if not is_file:
        raise ArtifactError(path, "is no file" if is_there else "does not exist", FIX)
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    # The lines of wiki.test.raw are rows that no line feeds join yet, so the text is another.
    if format_of(path) is None or name.suffix.lower() == ".raw":
        raise ConfigError(KEY, given, FILES, "Name such a file.")
    return CorpusSection(kind="files", path=str(path), join=BETWEEN_ROWS)


def _read(corpus: CorpusSection, given: str | None) -> str:
    """The whole text of a corpus.

    Raises:
        ConfigError, ArtifactError: as the readers of domains say it, in the words of this setting.
    """
    try:
        (document,) = documents(NAME, corpus)
    except ConfigError as error:
        allowed = (
            error.allowed if given else f"null reads {corpus.path} of the Hub: {error.allowed}"
        )
        raise ConfigError(KEY, given, allowed, FIX) from error
    except ArtifactError as error:
        raise ArtifactError(error.path, error.problem, FIX) from error
    return document.text
