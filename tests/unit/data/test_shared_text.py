"""Two domains over one text must hold out the same documents of it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from megamask.config import CorpusSection
from megamask.data.corpora import documents
from megamask.data.shared_text import check_shared_text
from megamask.data.split import HELDOUT, TRAIN, split_documents
from megamask.errors import ConfigError
from tests.unit.data.conftest import make_document, write_jsonl

ROWS = [make_document(number) for number in range(30)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "rows.jsonl", ROWS)


def domain(path: object, heldout: float = 0.3, kind: str = "jsonl", **more: Any) -> CorpusSection:
    return CorpusSection.model_validate(
        {"kind": kind, "path": None if path is None else str(path), "heldout": heldout, **more}
    )


def is_refused(*domains: CorpusSection) -> bool:
    try:
        check_shared_text({f"d{number}": one for number, one in enumerate(domains)})
    except ConfigError as error:
        assert "data.domains.d0.heldout, data.domains.d1.heldout = [" in str(error)
        return True
    return False


def sides(corpus: CorpusSection) -> dict[str, str]:
    """All text of either side."""
    found = {TRAIN: "", HELDOUT: ""}
    for side, document in split_documents(documents("d", corpus), corpus.heldout):
        found[side] += document.text + "\n"
    return found


def test_whatever_would_be_learned_from_held_out_text_is_refused(file: Path) -> None:
    shares, joins, kinds = (0.0, 0.3, 0.7, 1.0), (None, "\n"), ("jsonl", "files")
    domains = [
        domain(file, *one[:2], join=one[2]) for one in itertools.product(shares, kinds, joins)
    ]
    found = [sides(one) for one in domains]
    leaks = 0
    for (one, here), (other, there) in itertools.product(
        zip(domains, found, strict=True), repeat=2
    ):
        leak = any(
            row in learned[TRAIN] and row in held[HELDOUT]
            for row in ROWS
            for learned, held in ((here, there), (there, here))
        )
        assert is_refused(one, other) >= leak
        if (one.heldout, one.join) == (other.heldout, other.join):
            assert not leak and not is_refused(one, other)
        leaks += leak
    assert leaks > len(domains)


def test_a_source_is_known_by_every_name_and_link(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    below = tmp_path / "below"
    below.symlink_to(file.parent)
    for path in (file, file.parent, f"{file.parent}/*.jsonl", *tmp_path.iterdir()):
        assert is_refused(domain(file), domain(path, 0.2)), path
        assert not is_refused(domain(file), domain(path, max_bytes=500)), path
    copy = write_jsonl(tmp_path / "other.jsonl", ROWS)
    assert not is_refused(domain(file), domain(copy, 0.2))
    assert is_refused(domain(copy, 0.2), domain(f"{tmp_path}/*", 0.1))


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ({"field": "text"}, {"field": "body", "heldout": 0.2}, ""),  # other text of the same rows
        ({}, {"kind": "text"}, "both 0 or both 1, for the domains make other documents"),
        ({"kind": "stdlib"}, {"kind": "pydocs", "heldout": 0.2}, "one value.*Python installation"),
        ({"kind": "stdlib"}, {"kind": "pydocs"}, ""),
        ({"kind": "hf"}, {"kind": "hf", "heldout": 0}, "one value.*Set them to the same share"),
        ({"kind": "hf"}, {"kind": "hf", "heldout": 1, "split": "test"}, ""),
        ({"kind": "hf", "config": "en"}, {"kind": "hf", "heldout": 0}, ""),
    ],
)
def test_sources_of_every_kind(
    file: Path, one: dict[str, Any], other: dict[str, Any], says: str
) -> None:
    domains = {"a": domain(file, **one), "b": domain(file, **other)}
    if not says:
        check_shared_text(domains)
        return
    with pytest.raises(ConfigError, match=says):
        check_shared_text(domains)
