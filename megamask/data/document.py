"""A document of a corpus, and how far a corpus was read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        text: the text itself.
        key: the hash of this string decides whether the document is held out. It is the document's
            own text, or the text that the document was taken from.
        file: number of the file that the document was read from, where a corpus is read file by
            file; else 0.
    """

    text: str
    key: str
    file: int = 0

    @cached_property
    def size(self) -> int:
        """Bytes of UTF-8 of the text."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


@dataclass(frozen=True)
class Reached:
    """How far a corpus was read.

    Attributes:
        files: number of files that were read to their ends.
        size: bytes of UTF-8 of their documents.
    """

    files: int = 0
    size: int = 0


START = Reached()
