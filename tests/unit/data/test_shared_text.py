"""Two domains over one text must hold out the same documents of it; and shards must hold what the
settings name.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.config import Config, CorpusSection, run_paths
from megamask.data.blend import train_dataset
from megamask.data.corpora import documents
from megamask.data.heldout import calibration_description, evaluation_windows
from megamask.data.shared_text import check_shards, check_shared_text, learned_domains_with
from megamask.data.split import HELDOUT, TRAIN, split_documents
from megamask.errors import ConfigError
from megamask.verbs import tokenize
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


def test_a_local_dataset_is_known_by_every_name_and_link(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file.parent)
    here = domain(file.parent, kind="hf")
    for path in (f"{file.parent}/", f"{file.parent}/.", tmp_path / "link"):
        assert is_refused(here, domain(path, 0.2, kind="hf")), path
        assert not is_refused(here, domain(path, 0.2, kind="hf", split="test")), path
    assert not is_refused(here, domain(tmp_path, 0.2, kind="hf"))


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ({"field": "text"}, {"field": "body", "heldout": 0.2}, ""),  # other text of the same rows
        ({}, {"kind": "text"}, "both 0 or both 1, for the domains make other documents"),
        ({"kind": "stdlib"}, {"kind": "pydocs", "heldout": 0.2}, "one value.*Python installation"),
        ({"kind": "stdlib"}, {"kind": "pydocs"}, ""),
        ({"kind": "hf"}, {"kind": "hf", "heldout": 0}, "one value.*Set them to the same share"),
        ({"kind": "hf"}, {"kind": "hf", "heldout": 1, "split": "test"}, ""),
        ({"kind": "hf", "config": "en"}, {"kind": "hf", "heldout": 0}, "Name the config of both"),
        ({"kind": "hf", "config": "en"}, {"kind": "hf", "heldout": 0, "config": "fr"}, ""),
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


Make = Callable[..., Config]


def changed(config: Config, domain: str, /, **settings: Any) -> Config:
    """The settings with others of a domain."""
    values = config.model_dump()
    values["data"]["domains"][domain] |= settings
    return Config.model_validate(values)


@pytest.fixture
def shards(two_domains: Make) -> Config:
    """The settings of the shards in their run folder."""
    config = two_domains(evaluate={"window": 20})
    tokenize.run(config)
    check_shards(config)
    return config


def test_shards_of_other_documents_or_another_share_are_refused(shards: Config) -> None:
    texts = {"field": "id", "kind": "files", "join": "\n"}
    others: list[tuple[str, Any]] = [*texts.items(), ("max_bytes", 500)]
    for key, value in [*others, *(("heldout", share) for share in (0.0, 0.5, 1.0))]:
        now = changed(shards, "b", **{key: value})
        was = getattr(shards.data.domains["b"], key)
        says = f"data.domains.b.{key} = {value!r}: {was!r}, with which the shards in "
        with pytest.raises(ConfigError, match=re.escape(says)):
            check_shards(now)
        # the functions that give out text refuse too, where the domain is one of theirs
        given_out: list[Callable[[Config], object]] = []
        if now.data.domains["b"].heldout > 0:
            given_out.append(lambda config: evaluation_windows(config, 100))
        if now.data.domains["b"].heldout < 1:
            given_out.append(lambda config: train_dataset(config, 4, 16, seed=0))
            given_out.append(calibration_description)
        for function in given_out:
            with pytest.raises(ConfigError, match=rf"data\.domains\.b\.{key}"):
                function(now)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"kind": "parquet", "path": "x", "split": "test"}, "split"),
        ({"kind": "jsonl", "path": "x", "config": "en"}, "config"),
        ({"kind": "stdlib", "path": "x"}, "path"),
    ],
)
def test_a_setting_that_the_kind_does_not_read_is_refused(more: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.domains\.mine\.{key}"):
        Config.model_validate({"data": {"domains": {"mine": more}}})
    rest = {name: value for name, value in more.items() if name != key}
    if key != "path":
        Config.model_validate({"data": {"domains": {"mine": {**rest, "kind": "hf", key: "test"}}}})
    Config.model_validate({"data": {"domains": {"mine": {**rest, "split": "train"}}}})


def test_domains_that_learn_from_a_measured_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(file)
    asked = CorpusSection(kind="files", path=str(tmp_path / "link.jsonl"))
    other = write_jsonl(tmp_path / "other.jsonl", ROWS[:3])
    domains = {
        "folder": domain(file.parent, kind="files"),
        "measured": domain(file, heldout=1.0),
        "other": domain(other),
        "gone": domain(tmp_path / "gone.jsonl"),
        "hub": domain("allenai/c4", kind="hf", config="en", split="validation"),
    }
    assert learned_domains_with(asked, domains) == [("folder", str(file))]
    hub = CorpusSection(kind="hf", path="allenai/c4", config="en", split="validation")
    assert learned_domains_with(hub, domains) == [("hub", "allenai/c4")]
    assert not learned_domains_with(hub.model_copy(update={"split": "train"}), domains)


def test_a_corpus_may_be_moved_and_the_log_says_so(
    shards: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        for same in ("b.jsonl", f"{tmp_path}/./b.jsonl"):
            check_shards(changed(shards, "b", path=same))
        assert not caplog.messages
        check_shards(changed(shards, "b", path="gone.jsonl"))
    (said,) = caplog.messages
    assert said.startswith(
        f"data.domains.b.path: the shards were made from {tmp_path}/b.jsonl and not from gone.jsonl"
    )
    (tmp_path / "b.jsonl").unlink()  # shards do not need their corpus any more
    check_shards(shards)


def test_domains_that_were_tokenized_apart_are_compared_before_learning(
    shards: Config, tmp_path: Path
) -> None:
    """Domain c holds out all of the file that domain a learns from. The settings that learn name
    both; the verb tokenize never saw both, and the settings of c name another file by now.
    """
    values = shards.model_dump()
    domains = values["data"]["domains"]
    path = domains["a"]["path"]
    other = domain(path, 1.0).model_dump()
    values["data"]["domains"] = {"b": domains["b"], "c": other}
    tokenize.run(Config.model_validate(values))
    values["data"]["domains"] = {**domains, "c": other}
    both = Config.model_validate(values)
    for path_of_c in (path, "other.jsonl"):
        with pytest.raises(ConfigError, match=r"domains\.a\.heldout, data\.domains\.c\.heldout = "):
            check_shards(changed(both, "c", path=path_of_c))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ConfigError, match="one value, for both domains read"):
        check_shards(both)


def test_shards_without_a_note_of_their_corpus_are_taken_as_they_are(shards: Config) -> None:
    file = run_paths(shards).shards / "b" / "meta.json"
    meta = json.loads(file.read_text())
    noted: object
    for noted in (None, "text", {}):
        file.write_text(json.dumps({**meta, "corpus": noted}))
        if noted != {}:
            check_shards(changed(shards, "b", heldout=0.5))
    with pytest.raises(ConfigError, match=r"data\.domains\.b\.kind"):  # without a default
        check_shards(shards)
