"""The texts of published perplexities, cut as the programs of those tables cut them, so that
numbers compare.

**GPTQ, SparseGPT, Wanda.** WikiText-2: the raw test part, its rows joined with two line feeds. C4:
the first 1,100 documents of the first validation file joined with a space, of which the first 256
windows count. The scripts call the tokenizer once on the whole, which puts one BOS before the text
where the tokenizer has that habit, cut the ids into windows of L tokens that do not overlap, and
drop the tail. In each window the L - 1 tokens after the first are targets, and context never
crosses into the next window. All windows have the same number of targets, so the perplexity is exp
of the mean loss over all targets. (GPTQ's first script draws 256 windows of C4 from random
documents; its ``c4_new``, SparseGPT and Wanda take the rule above.)

**Megatron-LM** (``tasks/zeroshot_gpt``, the class ``_LMDataset``): a window has L tokens and L
targets, the last of which is the first token of the next window, so every token of the text but the
first is a target once; the last window may be shorter. The losses are summed and divided by the
number of tokens - 1. With ``--overlapping-eval`` below L, its default 32, windows overlap and only
the last targets of each count. MaskLLM's scripts set it to L = 4,096, read WikiText-2 as above, and
switch off the second number of Megatron-LM, which scales the loss to words. So its tables hold
exp of the mean loss over all targets of windows of 4,096, and so does the protocol ``megatron``.

Sources: E. Frantar et al., GPTQ (2210.17323) and SparseGPT (2301.00774); M. Sun et al., Wanda
(2306.11695); NVIDIA/Megatron-LM, tasks/zeroshot_gpt/{datasets,evaluate}.py and tasks/main.py; G.
Fang et al., MaskLLM (2409.17481), scripts/ppl.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from megamask.config import Config, CorpusSection
from megamask.data.bos import before_document
from megamask.data.corpora import documents
from megamask.data.text_files import COMPRESSIONS, format_of
from megamask.data.tokenizer import load_tokenizer
from megamask.data.windows import Windows, every_target, without_tail
from megamask.errors import ArtifactError, ConfigError

KEY = "evaluate.text"


@dataclass(frozen=True)
class Source:
    """A text that tables are measured on.

    Attributes:
        name: of the column of the table.
        hub: the dataset of the Hub.
        between: what stands between two rows.
        rows: the first rows that are taken; None = all.
        words: what a file of it is called in messages.
    """

    name: str
    hub: CorpusSection
    between: str
    rows: int | None
    words: str

    @property
    def files(self) -> str:
        """The files that ``evaluate.text`` may name."""
        between = "two line feeds" if self.between == "\n\n" else "a space"
        return (
            f"a file with {self.words}: its rows as .jsonl, .parquet or .arrow, or all of it "
            f"joined by {between} as .txt"
        )

    @property
    def fix(self) -> str:
        """The last sentence of messages."""
        return f"Set {KEY} to {self.files}."


WIKITEXT2 = Source(
    name="wikitext2",
    hub=CorpusSection(
        kind="hf", path="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test"
    ),
    between="\n\n",
    rows=None,
    words="the test part of WikiText-2",
)
C4 = Source(
    name="c4",
    hub=CorpusSection(kind="hf", path="allenai/c4", config="en", split="validation"),
    between=" ",
    rows=1100,
    words="the first validation documents of C4 (en/c4-validation.00000-of-00008)",
)


@dataclass(frozen=True)
class Protocol:
    """What a published perplexity is measured on.

    Attributes:
        source: the text.
        cut: ids and window to windows.
        tail: what becomes of the tokens after the last whole window.
        windows: the first windows that count; None = all.
    """

    source: Source
    cut: Callable[[list[int], int], Windows] = without_tail
    tail: str = "dropped"
    windows: int | None = None


MEGATRON = Protocol(WIKITEXT2, every_target, tail="a shorter window")
PROTOCOLS: dict[str, Protocol] = {
    "wikitext2-2048": Protocol(WIKITEXT2),
    "wikitext2-4096": Protocol(WIKITEXT2),
    "megatron": MEGATRON,
    "megatron-2048": MEGATRON,
    "c4": Protocol(C4, windows=256),
}


@dataclass(frozen=True)
class PublishedText:
    """The tokens of a text in windows.

    Attributes:
        windows: the windows and their targets.
        source: where the text came from.
        documents: of the text; 1 where all rows of the file or dataset are joined.
        sha256: of the text in UTF-8.
        has_bos: whether the first token is a BOS.
    """

    windows: Windows
    source: str
    documents: int
    sha256: str
    has_bos: bool


def published_text(config: Config, window: int, vocab: int) -> PublishedText:
    """The windows of the text of ``evaluate.protocol``. ``data.bos`` says whether the tokenizer
    puts a BOS before a text. Names of special tokens in the text are plain text.

    Args:
        config: names the protocol, the text and the tokenizer.
        window: tokens of a window.
        vocab: the model's vocabulary; every id must be below it.

    Raises:
        ConfigError: the text cannot be read as the setting says, or the tokenizer has no BOS and
            ``data.bos`` wants one.
        ArtifactError: the file is missing, empty, broken or too short for one window; or the model
            does not know an id.
    """
    protocol = PROTOCOLS[config.evaluate.protocol]
    source = protocol.source
    corpus = corpus_of(source, config.evaluate.text)
    rows = _rows(source, corpus, config.evaluate.text)
    text = source.between.join(rows)
    tokenizer = replace(load_tokenizer(config), model_vocab=vocab)
    begin = before_document(config, tokenizer)
    ids = [*begin, *tokenizer.encode(text)]
    tokenizer.check_ids(max(ids), tokenizer.name)
    if len(ids) < window:
        problem = f"has {len(ids):,} tokens, too few for one window of {window:,}"
        raise ArtifactError(str(corpus.path), problem, source.fix)
    return PublishedText(
        windows=protocol.cut(ids, window)[: protocol.windows],
        source=str(corpus.path),
        documents=len(rows),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        has_bos=bool(begin),
    )


def corpus_of(source: Source, given: str | None) -> CorpusSection:
    """Where the text of a protocol is read: the dataset on the Hub, or a file.

    Raises:
        ConfigError, ArtifactError: the file is not there, or has another form.
    """
    if given is None:
        return source.hub
    path = Path(given)
    try:
        is_file, is_there = path.is_file(), path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        is_file = is_there = False
    if not is_file:
        raise ArtifactError(path, "is no file" if is_there else "does not exist", source.fix)
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    # The lines of wiki.test.raw are rows that no line feeds join yet, so the text is another.
    if format_of(path) is None or name.suffix.lower() == ".raw":
        raise ConfigError(KEY, given, source.files, "Name such a file.")
    return CorpusSection(kind="files", path=str(path))


def _rows(source: Source, corpus: CorpusSection, given: str | None) -> list[str]:
    """The first rows of a corpus, blank rows included where all of them are joined.

    Raises:
        ConfigError, ArtifactError: as the readers of domains say it, in the words of this setting.
    """
    is_whole = source.rows is None
    if is_whole:
        corpus = corpus.model_copy(update={"join": source.between})
    try:
        found = [one.text for one in islice(documents(source.name, corpus), source.rows)]
    except ConfigError as error:
        allowed = (
            error.allowed if given else f"null reads {corpus.path} of the Hub: {error.allowed}"
        )
        raise ConfigError(KEY, given, allowed, source.fix) from error
    except ArtifactError as error:
        raise ArtifactError(error.path, error.problem, source.fix) from error
    return found
