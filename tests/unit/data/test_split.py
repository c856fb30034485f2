"""The split of documents: decided by content, stable, and never empty on a side by chance."""

from __future__ import annotations

import pytest

from megamask.data.document import Document
from megamask.data.split import split_documents, unit_hash


def split(texts: list[str], share: float) -> dict[str, list[str]]:
    sides: dict[str, list[str]] = {"train": [], "heldout": []}
    for side, document in split_documents([Document(text, text) for text in texts], share):
        sides[side].append(document.text)
    return sides


TEXTS = [f"document {number}" for number in range(2000)]


def test_share_and_completeness() -> None:
    sides = split(TEXTS, 0.1)
    assert sorted(sides["train"] + sides["heldout"]) == sorted(TEXTS)
    # 2000 draws with p = 0.1 have a standard deviation of 13.4; the tolerance is five of them.
    assert abs(len(sides["heldout"]) - 200) < 68


def test_documents_do_not_move_when_others_join_or_the_order_changes() -> None:
    few, more = split(TEXTS[:500], 0.1), split(TEXTS[::-1], 0.1)
    assert set(few["heldout"]) <= set(more["heldout"])
    assert set(few["train"]) <= set(more["train"])
    assert set(few["heldout"]) <= set(split(TEXTS[:500], 0.2)["heldout"])


def test_key_decides_and_not_the_text() -> None:
    held = next(text for text in TEXTS if unit_hash(text) < 0.1)
    kept = next(text for text in TEXTS if unit_hash(text) >= 0.1)
    pairs = list(split_documents([Document(kept, held), Document(held, kept)], 0.1))
    assert pairs == [("heldout", Document(kept, held)), ("train", Document(held, kept))]


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.9999])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_two_documents_are_enough_for_both_sides(share: float, count: int) -> None:
    for start in range(0, 400, count):
        texts = TEXTS[start : start + count]
        sides = split(texts, share)
        assert sides["train"] and sides["heldout"]
        assert sorted(sides["train"] + sides["heldout"]) == sorted(texts)


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.9999])
def test_duplicates_share_a_side_even_when_one_side_had_to_be_filled(share: float) -> None:
    for start in range(0, 200, 3):
        texts = TEXTS[start : start + 3] * 3
        sides = split(texts, share)
        assert set(sides["train"]).isdisjoint(sides["heldout"])
        assert sorted(sides["train"] + sides["heldout"]) == sorted(texts)


def test_one_document_is_for_training_and_the_ends_of_the_share_are_exact() -> None:
    assert split(["only", "only"], 0.5) == {"train": ["only", "only"], "heldout": []}
    assert split(TEXTS, 0.0) == {"train": TEXTS, "heldout": []}
    assert split(TEXTS, 1.0) == {"train": [], "heldout": TEXTS}
