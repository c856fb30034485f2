"""Domains that read the same text.

The hash of a document decides its side, so a document that two domains read has the same side in
both where they hold out the same share. Where they hold out other shares, one domain learns from
documents that are held out in the other. Such domains are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from megamask.config import Config, CorpusSection, run_paths
from megamask.data import in_place
from megamask.data.corpora import documents_of_files
from megamask.data.noted_corpus import check_noted, noted_corpus
from megamask.data.shards import read_shards
from megamask.data.text_files import corpus_files, format_of, required_path
from megamask.data.token_index import bin_file
from megamask.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """A file, a dataset or the Python installation, as a domain reads it.

    Attributes:
        key: equal for equal sources, whatever name or link leads there.
        name: for messages.
        form: how the documents are found in it.
        column: of the text, where the source has rows.
        join: the text between rows that are one document; None where they are documents.
        config: of a dataset; None where the dataset's only or default one is meant.
    """

    key: Any
    name: str
    form: str
    column: str | None
    join: str | None
    config: str | None = None

    def has_text_of(self, other: Source) -> bool:
        """Whether both read the same text."""
        columns, configs = {self.column, other.column}, {self.config, other.config}
        is_any = (None in some or len(some) == 1 for some in (columns, configs))
        return self.key == other.key and all(is_any)

    def has_documents_of(self, other: Source) -> bool:
        """Whether both make the same documents of the same text."""
        return (self.form, self.join) == (other.form, other.join)


def check_shared_text(domains: Mapping[str, CorpusSection]) -> None:
    """Check that no domain learns from text that is held out in another domain.

    Copies of a file, and a dataset that is read from the Hub and from a disk, are not noticed. With
    equal shares, a side that the hash leaves empty still takes the nearest document
    (:func:`megamask.data.split.split_documents`), in that domain alone.

    Raises:
        ConfigError: two domains read the same text and hold out other documents of it.
    """
    sources: dict[str, dict[Any, Source]] = {}
    for first, second in combinations(domains, 2):
        shares = [domains[first].heldout, domains[second].heldout]
        if shares in ([0, 0], [1, 1]) or _is_split_alike(domains[first], domains[second]):
            continue
        for name in {first, second} - sources.keys():  # a corpus may have many thousand files
            sources[name] = {one.key: one for one in _found_sources(name, domains[name])}
        there = sources[second]
        for one in sources[first].values():
            if one.key in there and one.has_text_of(there[one.key]):
                _check_pair(first, second, shares, one, there[one.key])


def check_shards(config: Config) -> None:
    """Check the shards of all domains, before a verb learns or measures: they were made as the
    settings say, and no domain learns from text that is held out in another. A domain whose files
    are gone since then is known by its path alone.

    Raises:
        ConfigError: naming the setting that differs from the shards, or as
            :func:`check_shared_text`.
        ArtifactError: shards are missing or torn.
    """
    made_from = {}
    for domain, corpus in config.data.domains.items():
        shards = read_shards(run_paths(config).shards / domain)
        check_noted(domain, corpus, shards.meta, shards.folder)
        made_from[domain] = noted_corpus(domain, corpus, shards.meta)
    check_shared_text(made_from)


def learned_domains_with(
    corpus: CorpusSection, domains: Mapping[str, CorpusSection]
) -> list[tuple[str, str]]:
    """The domains that read text of ``corpus`` and do not hold out all of it, each with the name of
    a file or dataset that both read. Copies are not noticed.
    """
    asked = _found_sources("", corpus)
    return [
        (name, shared)
        for name, one in domains.items()
        if one.heldout < 1
        for shared in [
            source.name
            for source in _found_sources(name, one)
            if any(source.has_text_of(other) for other in asked)
        ][:1]
    ]


def _check_pair(first: str, second: str, shares: list[float], one: Source, other: Source) -> None:
    both = f"data.domains.{first}.heldout, data.domains.{second}.heldout"
    if not one.has_documents_of(other):
        allowed = f"both 0 or both 1, for the domains make other documents of {one.name}"
        fix = "Read it alike (kind, join), or give each domain files of its own."
        raise ConfigError(both, shares, allowed, fix)
    if shares[0] != shares[1]:
        allowed = f"one value, for both domains read {one.name} and must hold out the same of it"
        fix = "Set them to the same share, or give each domain files of its own."
        if one.config != other.config:  # one names none, and may read the other's
            fix = f"Name the config of both, if they differ. {fix}"
        raise ConfigError(both, shares, allowed, fix)


def _is_split_alike(one: CorpusSection, other: CorpusSection) -> bool:
    """Whether both make the same documents, with the same sides, of whatever both read."""
    return (one.heldout, one.kind, one.join) == (other.heldout, other.kind, other.join)


def _found_sources(name: str, corpus: CorpusSection) -> list[Source]:
    """The sources of a domain; its path alone where the path leads to no file. Whoever reads the
    text says that there is none.
    """
    try:
        return list(_sources(name, corpus))
    except ConfigError:
        place = str(corpus.path)
        return [Source(place, place, corpus.kind, None, corpus.join)]


def _sources(name: str, corpus: CorpusSection) -> Iterator[Source]:
    """The sources of a domain, each once or more often.

    Raises:
        ConfigError: the path is not given or matches nothing.
    """
    join = corpus.join
    if corpus.kind == "megatron":
        for key, file in _files(map(bin_file, in_place.prefixes(name, corpus))):
            yield Source(key, file, corpus.kind, None, None)
    elif corpus.kind == "hf":
        path = required_path(name, corpus)
        folder = Path(path).stat() if Path(path).is_dir() else None
        place = (folder.st_dev, folder.st_ino) if folder else path
        yield Source((place, corpus.split), path, corpus.kind, corpus.field, join, corpus.config)
    elif documents_of_files(corpus):
        for key, file in _files(corpus_files(name, corpus)[0]):
            form = format_of(Path(file)) if corpus.kind == "files" else corpus.kind
            column = None if form == "text" else corpus.field
            yield Source(key, file, str(form), column, join)
    else:  # the source and the prose of a file have the same side
        yield Source("python", "the Python installation", "stdlib", None, join)


def _files(files: Iterable[Path]) -> Iterator[tuple[tuple[int, int], str]]:
    """Device and inode of each file that is there, and its path."""
    for file in files:
        if file.is_file():
            stat = file.stat()
            yield (stat.st_dev, stat.st_ino), str(file)
