"""The verb tokenize: what it writes, what it reuses, what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from megamask.config import Config, run_paths
from megamask.data.shards import open_shards, read_shards
from megamask.data.split import unit_hash
from megamask.data.tokenizer import load_tokenizer
from megamask.data.write_shards import settings_digest
from megamask.errors import ArtifactError, ConfigError
from megamask.verbs import tokenize


def lines(path: str | None) -> list[str]:
    assert path
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def test_shards_hold_the_tokens_of_each_side_with_eod(
    two_domains: Callable[..., Config], tokenizer_folder: Path
) -> None:
    config = two_domains()
    tokenize.run(config)
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for name, corpus in config.data.domains.items():
        shards = open_shards(config, name, "train", load_tokenizer(config))
        for side, is_heldout in (("train", False), ("heldout", True)):
            texts = [text for text in lines(corpus.path) if (unit_hash(text) < 0.25) == is_heldout]
            ids = [token for text in texts for token in [*plain.encode(text).ids, 0]]
            np.testing.assert_array_equal(shards.stream(side), ids)
            counts = shards.meta["splits"][side]
            assert (counts["documents"], counts["tokens"]) == (len(texts), len(ids))
            assert counts["bytes"] == sum(len(text.encode()) for text in texts)
            digest = hashlib.sha256((shards.folder / f"{side}.bin").read_bytes()).hexdigest()
            assert counts["files"][f"{side}.bin"]["sha256"] == digest


def test_without_eod(two_domains: Callable[..., Config]) -> None:
    config = two_domains(eod=None)
    tokenize.run(config)
    assert 0 not in read_shards(run_paths(config).shards / "a").stream("train")


def test_sentencepiece_shards(
    two_domains: Callable[..., Config], sentencepiece_model: Path
) -> None:
    import sentencepiece

    config = two_domains(tokenizer=str(sentencepiece_model))
    tokenize.run(config)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    text = next(text for text in lines(config.data.domains["a"].path) if unit_hash(text) >= 0.25)
    ids = [*plain.encode(text), plain.eos_id()]
    np.testing.assert_array_equal(
        read_shards(run_paths(config).shards / "a").stream("train")[: len(ids)], ids
    )


def stamps(config: Config, name: str) -> list[int]:
    return [file.stat().st_mtime_ns for file in sorted((run_paths(config).shards / name).iterdir())]


def test_second_run_keeps_what_fits_and_redoes_the_rest(
    two_domains: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = two_domains()
    tokenize.run(config)
    before = stamps(config, "a")
    tokenize.run(config)
    assert stamps(config, "a") == before and capsys.readouterr().err.count("kept") == 2
    with open(config.data.domains["b"].path or "", "a") as stream:
        stream.write('{"text": "one more"}\n')
    tokenize.run(config)
    assert stamps(config, "a") == before and "b: tokenized" in capsys.readouterr().err
    tokenize.run(two_domains(eod="<end>"))
    assert stamps(config, "a") != before
    assert read_shards(run_paths(config).shards / "a").stream("heldout")[-1] == 2


def test_torn_shards_are_redone(two_domains: Callable[..., Config]) -> None:
    config = two_domains()
    tokenize.run(config)
    torn = run_paths(config).shards / "a" / "train.bin"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-2])
    tokenize.run(config)
    assert torn.read_bytes() == whole


def test_truncated_missing_and_foreign_shards_are_refused(
    two_domains: Callable[..., Config], other_tokenizer_folder: Path
) -> None:
    config = two_domains()
    tokenizer = load_tokenizer(config)
    with pytest.raises(ArtifactError, match="missing.*verb tokenize"):
        open_shards(config, "a", "train", tokenizer)
    tokenize.run(config)
    other = load_tokenizer(two_domains(tokenizer=str(other_tokenizer_folder)))
    with pytest.raises(ArtifactError, match="tokenizer.*differs.*verb tokenize"):
        open_shards(config, "a", "train", other)
    for name in ("train.bin", "heldout.idx"):
        file = run_paths(config).shards / "a" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError, match=rf"{name}.*truncated.*verb tokenize"):
            open_shards(config, "a", "train", tokenizer)
        file.unlink()
        with pytest.raises(ArtifactError, match=rf"{name}.*missing.*verb tokenize"):
            open_shards(config, "a", "train", tokenizer)
        file.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"data\.domains.*a, b"):
        open_shards(config, "c", "train", tokenizer)


def test_shards_with_other_ends_are_refused(two_domains: Callable[..., Config]) -> None:
    """Shards of before, which noted no ends, are taken as they are."""
    config, begun = two_domains(), two_domains(bos=True)
    tokenize.run(config)
    note = run_paths(config).shards / "a" / "meta.json"
    meta = json.loads(note.read_text())

    def opens(asked: Config, **noted: Any) -> None:
        made_by = {**meta["tokenizer"], **noted.pop("tokenizer", {})}
        made_by = {key: value for key, value in made_by.items() if value != "absent"}
        note.write_text(json.dumps({**meta, **noted, "tokenizer": made_by}))
        open_shards(asked, "a", "train", load_tokenizer(asked))

    for eod, said in (("<end>", r"data\.eod is the token 2"), (None, r"data\.eod is no token")):
        with pytest.raises(ArtifactError, match=rf"end with the token 0; {said} now.*tokenize"):
            opens(two_domains(eod=eod))
        opens(two_domains(eod=eod), tokenizer={"eod": "absent"})
    opens(two_domains(eod=None), append_eod=False)
    with pytest.raises(ArtifactError, match=r"end with no token; data\.eod is the token 0 now"):
        opens(config, append_eod=False)
    opens(config, tokenizer={"bos": 7})  # no document begins with it
    with pytest.raises(ArtifactError, match=r"begin with the token 7; the BOS .* the token 1 now"):
        opens(begun, prepend_bos=True, tokenizer={"bos": 7})
    opens(begun, prepend_bos=True)
    opens(begun, prepend_bos=True, tokenizer={"bos": "absent"})


def test_a_side_without_text_is_refused(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    (tmp_path / "one.txt").write_text("the only document")
    config = make_config({"d": {"kind": "text", "path": str(tmp_path / "one.txt")}})
    tokenize.run(config)
    open_shards(config, "d", "train", load_tokenizer(config))
    with pytest.raises(ArtifactError, match=r"no heldout text.*d is one document"):
        open_shards(config, "d", "heldout", load_tokenizer(config))


def test_errors_come_before_any_work(
    tmp_path: Path, two_domains: Callable[..., Config], make_config: Callable[..., Config]
) -> None:
    good = two_domains().data.domains["a"].model_dump()
    (tmp_path / "empty.jsonl").write_text("")
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "empty": (
            {"d": {"kind": "jsonl", "path": str(tmp_path / "empty.jsonl")}},
            r"no text.*data\.domains\.d",
        ),
        "column": ({"d": {**good, "field": "body"}}, r"data\.domains\.d\.field"),
        "missing": ({"d": {**good, "path": "absent.jsonl"}}, r"data\.domains\.d\.path"),
        "folder name": ({"a/b": good}, r"data\.domains"),
        "shares": (
            {"c": {"kind": "stdlib", "heldout": 0.1}, "e": {"kind": "pydocs"}},
            "must hold out the same of it",
        ),
    }
    for domains, message in bad.values():
        config = make_config({"good": good, **domains})
        with pytest.raises((ConfigError, ArtifactError), match=message):
            tokenize.run(config)
        assert not (run_paths(config).shards / "good").exists()
    with pytest.raises(ConfigError, match=r"data\.domains"):
        tokenize.run(make_config({}))


def test_settings_that_came_later_leave_older_shards_current(
    two_domains: Callable[..., Config],
) -> None:
    """The digest is over the settings of version 0.1.0, plus later settings that are set."""
    config = two_domains()
    corpus, tokenizer = config.data.domains["a"], load_tokenizer(config)
    file = Path(corpus.path or "")
    first = {"kind", "path", "config", "split", "field", "max_bytes", "heldout"}
    stat = file.stat()
    deciding = [
        1,
        {key: value for key, value in corpus.model_dump().items() if key in first},
        [[str(file), stat.st_size, stat.st_mtime_ns]],
        tokenizer.fingerprint,
        [0],
    ]
    wanted = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    assert settings_digest(config, "a", tokenizer) == wanted
    joined = config.model_dump()
    joined["data"]["domains"]["a"]["join"] = ""
    assert settings_digest(Config.model_validate(joined), "a", tokenizer) != wanted
