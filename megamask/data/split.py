"""The split of documents into training and held-out text.

A hash of the document decides, so a document stays on its side when others join the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

TRAIN, HELDOUT = "train", "heldout"
_HASH_KEY = b"megamask held-out documents v1"


class Keyed(Protocol):
    """A document with a key, whose hash decides the side."""

    @property
    def key(self) -> str | bytes:
        """The key."""


D = TypeVar("D", bound=Keyed)


def unit_hash(key: str | bytes) -> float:
    """A keyed hash of ``key``, uniform in [0, 1)."""
    data = key.encode() if isinstance(key, str) else key
    digest = hashlib.blake2b(data, digest_size=8, key=_HASH_KEY).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass
class SplitState:
    """What a split knows of the documents that it has seen.

    Attributes:
        settled: whether the hash of a document alone decides its side from now on, because both
            sides have documents or one side is meant to be empty; then no document waits.
    """

    settled: bool = False


def split_documents(
    documents: Iterable[D], share: float, state: SplitState | None = None
) -> Iterator[tuple[str, D]]:
    """Yield (side, document) for every document; the order may differ from that of ``documents``.

    The side is ``heldout`` where the hash of the document's key is below ``share``, so documents
    with equal keys get the same side. Where the hash would leave one side empty, the documents of
    the key whose hash is nearest to ``share`` move there; so two different documents are enough for
    both sides, and no other document moves. Only the documents of that key are kept in memory.

    Args:
        documents: the documents, or the rest of them where ``state`` is settled already.
        share: of the hashes that are held out.
        state: of the split; it is true whenever a document was yielded.
    """
    first_side = ""
    state = state or SplitState()
    state.settled = state.settled or share in (0.0, 1.0)
    others = False  # whether the first side has documents of other keys than the nearest
    nearest: list[D] = []  # the documents of the key that may still move
    nearest_distance = 0.0
    for document in documents:
        unit = unit_hash(document.key)
        side, distance = (HELDOUT if unit < share else TRAIN), abs(unit - share)
        first_side = first_side or side
        if state.settled or side != first_side:
            state.settled = True
            yield from ((first_side, waiting) for waiting in nearest)
            nearest = []
            yield side, document
        elif not nearest or distance < nearest_distance:
            others = others or bool(nearest)
            yield from ((first_side, waiting) for waiting in nearest)
            nearest, nearest_distance = [document], distance
        elif document.key == nearest[0].key:
            nearest.append(document)
        else:
            others = True
            yield first_side, document
    moved = HELDOUT if first_side == TRAIN else TRAIN
    yield from ((moved if others else TRAIN, waiting) for waiting in nearest)
