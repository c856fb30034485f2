"""Shards that Megatron's own tools wrote: used in place, split as our own, checked as a whole."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from megamask.config import Config, run_paths
from megamask.data.blend import train_dataset
from megamask.data.heldout import calibration_tokens, heldout_windows
from megamask.data.shards import read_shards
from megamask.data.split import unit_hash
from megamask.data.token_index import HEADER, idx_file
from megamask.data.tokenizer import load_tokenizer
from megamask.data.write_shards import settings_digest, write_domain
from megamask.errors import ArtifactError, ConfigError, MegamaskError
from megamask.verbs import tokenize
from tests.unit.data.conftest import make_document, write_jsonl

EOD, SEQ = 0, 32
MakeConfig = Callable[..., Config]


def write_shards(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> Path:
    """Megatron's builder, as its preprocessing uses it; every third document has two sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for number, ids in enumerate(documents):
        lengths = [3, len(ids) - 3] if number % 3 == 0 else [len(ids)]
        builder.add_document(list(ids), lengths)
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def ids(make_config: MakeConfig) -> list[list[int]]:
    """Sixty documents with an EOD each."""
    encode = load_tokenizer(make_config({})).encode
    return [[*encode(make_document(number)), EOD] for number in range(60)]


def is_held(document: list[int], share: float = 0.25) -> bool:
    return unit_hash(np.array(document, "<i4").tobytes()) < share


def in_place(path: object, heldout: float = 0.25, **more: Any) -> dict[str, Any]:
    return {"kind": "megatron", "path": str(path), "heldout": heldout, **more}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sides_are_documents_and_nothing_is_rewritten(
    tmp_path: Path,
    make_config: MakeConfig,
    ids: list[list[int]],
    dtype: Any,
    tokenizer_folder: Path,
) -> None:
    write_shards(tmp_path / "data" / "a_text_document", ids[:40], dtype)
    write_shards(tmp_path / "data" / "sub" / "b_text_document", ids[40:], np.int32)
    before = contents(tmp_path / "data")
    config = make_config({"d": in_place(tmp_path / "data")}, calibration={"samples": 4})
    tokenize.run(config)
    shards = read_shards(run_paths(config).shards / "d")
    for side in ("train", "heldout"):
        chosen = [one for one in ids if is_held(one) == (side == "heldout")]
        assert shards.stream(side).tolist() == [token for one in chosen for token in one]
        assert shards.meta["splits"][side]["documents"] == len(chosen) > 5
        assert shards.tokens(side) == sum(map(len, chosen))
    assert heldout_windows(config, "d", 20, None).numel() > 100
    samples = train_dataset(config, 200, SEQ, seed=3)
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    rows = [samples[number]["tokens"].tolist() for number in range(200)]
    seen = {int(one) for row in rows for one in re.findall(r"doc(\d+)x", plain.decode(row))}
    held = {number for number, one in enumerate(ids) if is_held(one)}
    assert held and held.isdisjoint(seen) and held | seen == set(range(60))
    assert calibration_tokens(config).shape == (4, config.calibration.seq_length)
    assert contents(tmp_path / "data") == before


def test_samples_are_those_of_our_own_shards(
    tmp_path: Path, make_config: MakeConfig, ids: list[list[int]]
) -> None:
    """The same documents, tokenized here and by Megatron's tools, give the same samples."""
    file = write_jsonl(tmp_path / "a.jsonl", [make_document(number) for number in range(60)])
    write_shards(tmp_path / "one", ids)
    own = make_config({"d": {"kind": "jsonl", "path": str(file), "heldout": 0}})
    tokenize.run(own)
    # a document of two sequences is shuffled in two pieces, so both have one sequence each here
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "one.bin"), dtype=np.int32)
    for document in ids:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "one.idx"))
    wanted = train_dataset(own, 100, SEQ, seed=3)
    expected = torch.stack([wanted[number]["tokens"] for number in range(100)])
    config = make_config({"d": in_place(tmp_path / "one", heldout=0)})
    tokenize.run(config)
    found = train_dataset(config, 100, SEQ, seed=3)
    assert torch.equal(torch.stack([found[number]["tokens"] for number in range(100)]), expected)


def test_paths(tmp_path: Path, make_config: MakeConfig, ids: list[list[int]]) -> None:
    for name in ("web_text_document", "code_text_document"):
        write_shards(tmp_path / name, ids[:9])
    write_shards(tmp_path / "other.d" / "v1.0", ids[9:12])
    write_shards(tmp_path / "in[1]" / "of [2]", ids[12:17])
    for path, count in (
        ("web_text_document", 9),
        ("web_text_document.idx", 9),
        ("web_text_document.bin", 9),
        ("*_text_document", 18),
        ("*_text_document.idx", 18),
        ("other.d/v1.0", 3),
        ("in[1]/of [2]", 5),
        ("in[1]/of [2].bin", 5),
        ("in[1]", 5),
        (".", 26),
    ):
        config = make_config({"d": in_place(tmp_path / path, heldout=0)})
        tokenize.run(config)
        meta = read_shards(run_paths(config).shards / "d").meta
        assert meta["splits"]["train"]["documents"] == count


def test_a_second_run_keeps_what_fits(
    tmp_path: Path,
    make_config: MakeConfig,
    ids: list[list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = write_shards(tmp_path / "web", ids)
    config = make_config({"d": in_place(prefix)})
    tokenize.run(config)
    tokenize.run(config)
    assert "d: kept" in capsys.readouterr().err
    write_shards(prefix, ids[:30])
    with pytest.raises(ArtifactError, match=r"web\.(bin|idx).*truncated.*verb tokenize"):
        train_dataset(config, 10, SEQ, seed=3)
    tokenize.run(config)
    assert "d: tokenized" in capsys.readouterr().err
    train_dataset(config, 10, SEQ, seed=3)


def test_nobody_is_told_to_delete_a_dataset(
    tmp_path: Path, make_config: MakeConfig, ids: list[list[int]]
) -> None:
    prefix = write_shards(tmp_path / "web", ids)
    config = make_config({"d": in_place(prefix)})
    tokenize.run(config)
    index = idx_file(prefix)
    whole = index.read_bytes()
    shorter = bytearray(whole)  # of the same size, with a token less in its first sequence
    struct.pack_into("<i", shorter, HEADER.size, 2)
    for changed, said in (
        (whole[:-8], "truncated"),
        (b"x" + whole[1:], "no usable index"),
        (bytes(shorter), "other sequences"),
    ):
        index.write_bytes(changed)
        with pytest.raises(ArtifactError, match=rf"web\.idx.*{said}.*verb tokenize") as caught:
            train_dataset(config, 10, SEQ, seed=3)
        assert "Delete" not in str(caught.value)


def test_two_domains_that_split_one_dataset(
    tmp_path: Path, make_config: MakeConfig, ids: list[list[int]], tokenizer_folder: Path
) -> None:
    """Each reads its own training documents, also from a cache, though Megatron's names of the
    indices are the same. Shards of unequal shares are from before ``tokenize`` refused them.
    """
    prefix = write_shards(tmp_path / "web", ids)
    shares = {"few": 0.75, "many": 0.25}
    config = make_config({name: in_place(prefix, share) for name, share in shares.items()})
    with pytest.raises(
        ConfigError, match=r"few\.heldout, .* one value, for both domains read .*web"
    ):
        tokenize.run(config)
    tokenizer = load_tokenizer(config)
    for name in shares:
        write_domain(config, name, tokenizer, settings_digest(config, name, tokenizer))
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for seed, order in ((3, ["few", "many"]), (3, ["few", "many"]), (3, ["many", "few"])):
        domains = {name: in_place(prefix, shares[name]) for name in order}
        samples = train_dataset(make_config(domains), 400, SEQ, seed=seed)
        for place, name in enumerate(order):
            rows = [samples[at] for at in range(400)]
            read = [row["tokens"].tolist() for row in rows if row["dataset_id"] == place]
            assert len(read) == 200
            seen = {int(x) for x in re.findall(r"doc(\d+)x", " ".join(plain.decode_batch(read)))}
            assert seen == {n for n, one in enumerate(ids) if not is_held(one, shares[name])}
    caches = [one for one in (run_paths(config).shards / "cache").iterdir()]
    assert len(caches) == 2  # the second run read what the first wrote
    assert all(len(list(cache.rglob("*.npy"))) == 6 for cache in caches)


def test_another_tokenizer_is_refused(
    tmp_path: Path, make_config: MakeConfig, ids: list[list[int]], other_tokenizer_folder: Path
) -> None:
    """By the ids, by the ends of the documents, and by the note of shards of this package."""
    prefix = write_shards(tmp_path / "web", [*ids, [400, 5, 6, EOD]])
    with pytest.raises(ArtifactError, match=r"web\.bin.*token id 400.*below 320.*data\.tokenizer"):
        tokenize.run(make_config({"d": in_place(prefix)}))
    write_shards(prefix, [*ids, [-3, 5, 6, EOD]], np.int32)
    with pytest.raises(ArtifactError, match=r"web\.bin.*token id -3"):
        tokenize.run(make_config({"d": in_place(prefix)}))
    write_shards(prefix, [one[:-1] for one in ids])
    with pytest.raises(ArtifactError, match=r"web\.bin.*0 of 60 documents that end.*eod=null"):
        tokenize.run(make_config({"d": in_place(prefix)}))
    tokenize.run(make_config({"d": in_place(prefix)}, eod=None))
    write_shards(prefix, [[1, *one] for one in ids])
    with pytest.raises(ArtifactError, match=r"60 of 60 documents that begin.*data\.bos=true"):
        tokenize.run(make_config({"d": in_place(prefix)}))
    tokenize.run(make_config({"d": in_place(prefix)}, bos=True))
    with pytest.raises(ArtifactError, match=r"0 of 60 documents that begin.*data\.bos=false"):
        write_shards(prefix, ids)
        tokenize.run(make_config({"d": in_place(prefix)}, bos=True))
    file = write_jsonl(tmp_path / "a.jsonl", [make_document(number) for number in range(20)])
    own = make_config({"d": {"kind": "jsonl", "path": str(file)}})
    tokenize.run(own)
    theirs = run_paths(own).shards / "d" / "train"
    domains = {"e": in_place(theirs)}
    tokenize.run(make_config(domains))
    with pytest.raises(ArtifactError, match=r"train\.bin.*was made with the tokenizer"):
        tokenize.run(make_config(domains, tokenizer=str(other_tokenizer_folder)))


def test_most_documents_of_each_dataset_begin_and_end_as_the_settings_say(
    tmp_path: Path, make_config: MakeConfig, ids: list[list[int]]
) -> None:
    """Half of them is too few, and a good dataset does not speak for the other."""
    write_shards(tmp_path / "a", ids)
    bare, begun = [one[:-1] for one in ids], [[1, *one] for one in ids]
    cases: tuple[tuple[list[list[int]], bool, str | None], ...] = (
        ([*ids[:31], *bare[31:]], False, None),
        ([*ids[:30], *bare[30:]], False, r"b\.bin.*30 of 60 documents that end with the token 0"),
        ([*ids[:1], *bare[1:]], False, r"b\.bin.*1 of 60 documents that end with the token 0"),
        ([*begun[:30], *ids[30:]], False, None),
        ([*begun[:31], *ids[31:]], False, r"b\.bin.*31 of 60 documents that begin.*bos=true"),
        (begun, True, r"a\.bin.*0 of 60 documents that begin.*bos=false"),
    )
    for documents, bos, said in cases:
        write_shards(tmp_path / "b", documents)
        config = make_config({"d": in_place(tmp_path / "[ab]", heldout=0)}, bos=bos)
        if said is None:
            tokenize.run(config)
        else:
            with pytest.raises(ArtifactError, match=said):
                tokenize.run(config)
    for documents, fits in (([*begun[:31], *ids[31:]], True), ([*begun[:30], *ids[30:]], False)):
        write_shards(tmp_path / "b", documents)
        config = make_config({"d": in_place(tmp_path / "b", heldout=0)}, bos=True)
        with nullcontext() if fits else pytest.raises(ArtifactError, match="30 of 60"):
            tokenize.run(config)


def test_settings_that_cannot_work(
    tmp_path: Path, make_config: MakeConfig, ids: list[list[int]]
) -> None:
    prefix = write_shards(tmp_path / "web", ids)
    for corpus, said in (
        (in_place(tmp_path / "absent"), r"data\.domains\.d\.path.*none is there"),
        (in_place(prefix, max_bytes=100), r"data\.domains\.d\.max_bytes"),
        (in_place(prefix, join=" "), r"data\.domains\.d\.join"),
        ({"kind": "megatron"}, r"data\.domains\.d\.path"),
        (in_place("a\0b"), r"data\.domains\.d\.path"),
    ):
        with pytest.raises(ConfigError, match=said):
            tokenize.run(make_config({"d": corpus}))
    (tmp_path / "web.bin").unlink()
    with pytest.raises(ArtifactError, match=r"web\.bin.*No such file.*data\.domains\.d\.path"):
        tokenize.run(make_config({"d": in_place(prefix)}))
    write_shards(prefix, ids)
    (tmp_path / "web.idx").write_bytes(b"MMIDIDX\0\0garbage")
    with pytest.raises(ArtifactError, match=r"web\.idx.*no usable index"):
        tokenize.run(make_config({"d": in_place(prefix)}))


def test_notes_that_were_changed(
    tmp_path: Path, make_config: MakeConfig, ids: list[list[int]]
) -> None:
    config = make_config({"d": in_place(write_shards(tmp_path / "web", ids))})
    tokenize.run(config)
    folder = run_paths(config).shards / "d"
    file, note = folder / "train.npy", folder / "meta.json"
    whole, meta = file.read_bytes(), json.loads(note.read_text())
    numbers = np.load(file)
    for changed in (
        numbers[::-1],
        numbers + 60,
        numbers - 5,
        np.r_[numbers[1:], 79],
        numbers.astype(np.float64),
        np.array([None] * len(numbers), object),
        np.zeros((len(numbers), 1), np.int64),
    ):
        np.save(file, changed, allow_pickle=True)
        meta["splits"]["train"]["files"]["train.npy"]["size"] = file.stat().st_size
        note.write_text(json.dumps(meta))
        with pytest.raises(MegamaskError, match=r"train\.npy.*verb tokenize"):
            train_dataset(config, 10, SEQ, seed=3)
    file.write_bytes(whole)
    wrong: list[Any] = [{}, {"prefix": 3}, [], None, {**meta["sources"][0], "files": {}}]
    for source in wrong:
        note.write_text(json.dumps({**meta, "sources": [source]}))
        with pytest.raises(ArtifactError, match=r"meta\.json.*in sources"):
            read_shards(folder)
