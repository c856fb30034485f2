"""The corpus that shards were made from, against the corpus that the settings name.

``meta.json`` of the shards notes the settings of their corpus. Shards that hold out other documents
than the settings say would be learned from and measured under a wrong name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megamask.config import CorpusSection
from megamask.errors import ConfigError
from megamask.storage import real_path
from megamask.user_paths import with_home

log = logging.getLogger(__name__)
ELSEWHERE = "path"  # the setting whose content decides: a corpus may be moved


def check_noted(domain: str, corpus: CorpusSection, meta: Mapping[str, Any], folder: Path) -> None:
    """Check that shards were made from the documents, and with the share of held-out documents,
    that the settings name. The path is left to :func:`warn_of_other_path`.

    Args:
        domain: of the shards.
        corpus: the settings of the domain.
        meta: meta.json of the shards; a meta.json without a corpus is taken as it is.
        folder: of the shards, for messages.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for key, before, now in _differences(corpus, meta):
        if key != ELSEWHERE:
            allowed = f"{before!r}, with which the shards in {folder} were made"
            fix = "Run the verb tokenize, or set it as it was."
            raise ConfigError(f"data.domains.{domain}.{key}", now, allowed, fix)


def noted_corpus(domain: str, corpus: CorpusSection, meta: Mapping[str, Any]) -> CorpusSection:
    """The corpus that shards passing :func:`check_noted` were made from. A warning names its path
    where the settings name another.
    """
    for key, before, now in _differences(corpus, meta):
        if key == ELSEWHERE and isinstance(before, str | None):
            said = "data.domains.%s.path: the shards were made from %s and not from %s; "
            said += "run the verb tokenize unless the text is the same"
            log.warning(said, domain, before, now)
            return corpus.model_copy(update={key: before})
    return corpus


def _differences(
    corpus: CorpusSection, meta: Mapping[str, Any]
) -> Iterator[tuple[str, object, object]]:
    """(setting, value that the shards were made with, value now) of the settings that differ."""
    noted = meta.get("corpus")
    if not isinstance(noted, dict):
        return
    for key, now in corpus.model_dump().items():
        # A setting that came after the shards had its default when they were made.
        before = noted.get(key, CorpusSection.model_fields[key].default)
        if before != now and not (key == ELSEWHERE and _is_same_place(before, now)):
            yield key, before, now


def _is_same_place(before: object, now: object) -> bool:
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    known = with_home(before)  # a note of an older version has the ~ of the user
    try:
        return known is not None and real_path(Path(known)) == real_path(Path(now))
    except (OSError, ValueError):  # too long, a zero byte
        return False
