"""Whatever an index of tokens or a cache of sample indices holds, it is read or refused: Megatron's
readers never get a file that would end them.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamask.data.blend import _cached_datasets, _dataset_config, _domain_datasets
from megamask.data.sample_cache import describes_samples
from megamask.data.shards import Part, describe_file, read_shards
from megamask.data.token_index import HEADER, bin_file, idx_file, read_index
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ArtifactError
from tests.fuzz.mutations import json_writer, patience, put, share_of, survives

MUTATIONS = 2200  # of each token type
CACHES = 600
SEQ = 8
ODD = [0, 1, -1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, -(2**31), 2**32, 2**40, 2**60, 2**63 - 1]
LENGTHS = [5, 1, 9, 30, 2, 17]


def write_dataset(prefix: Path, dtype: type[np.integer[Any]]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_file(prefix)), dtype=dtype)
    for number, length in enumerate(LENGTHS):
        builder.add_document([number * 100 + place for place in range(length)], [length])
    builder.finalize(str(idx_file(prefix)))


def mutated(data: bytes, choose: random.Random) -> bytes:
    """A copy with odd numbers in places of the format, other bytes, or another size."""
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2])):
        what, odd = choose.random(), choose.choice(ODD)
        if what < 0.3:  # a number of the arrays, in its own width or in another
            width, code = choose.choice([(4, "<i"), (8, "<q")])
            place = HEADER.size + 4 * choose.randrange((len(data) - HEADER.size) // 4 - 1)
            number = struct.pack("<q", odd if odd < 2**63 else -1)[:width]
            changed[place : place + struct.calcsize(code)] = number
        elif what < 0.5:  # a count, the version or the code
            place, width = choose.choice([(9, 8), (17, 1), (18, 8), (26, 8)])
            changed[place : place + width] = struct.pack("<q", odd)[:width]
        elif what < 0.6:  # a count that nearly fits
            place = choose.choice([18, 26])
            near = int.from_bytes(data[place : place + 8], "little") + choose.choice([-1, 1])
            changed[place : place + 8] = near.to_bytes(8, "little")
        elif what < 0.85:
            changed[choose.randrange(len(changed))] = choose.randrange(256)
        elif what < 0.95:
            del changed[choose.randrange(len(changed)) :]
            changed += bytes(0 if len(changed) >= 2 else 2)
        else:
            changed += bytes(choose.choice([1, 6, 8, 100]))
    return bytes(changed)


def settings(prefix: Path) -> Any:
    tokenizer = TextTokenizer("t", 1000, 0, None, "f", lambda texts: [])
    return _dataset_config([(part_of(prefix), 1.0)], tokenizer, SEQ, 3)


def part_of(prefix: Path) -> Part:
    index = read_index(prefix, "Write it again.")
    return Part(index, np.arange(len(index.lengths), dtype=np.int32))


def samples(datasets: list[Any]) -> torch.Tensor:
    (dataset,) = datasets
    return torch.stack([dataset[number]["tokens"] for number in range(len(dataset))])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_indices_of_tokens(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    prefix = tmp_path / "web_text_document"
    write_dataset(prefix, dtype)
    data, outcomes = idx_file(prefix).read_bytes(), Counter[str]()
    config = settings(prefix)
    for seed in range(share_of(MUTATIONS)):
        choose = random.Random(seed)
        put(idx_file(prefix), mutated(data, choose))
        try:
            with patience():
                part = part_of(prefix)
        except ArtifactError as error:
            assert str(idx_file(prefix)) in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        with patience():
            tokens = part.index.all_tokens()
            assert (
                part.tokens
                == part.index.tokens
                == sum(len(part.index.sequence(tokens, number)) for number in part.sequences)
            )
            if part.tokens > 1:  # Megatron's own readers take it
                datasets = _domain_datasets([(part, 20)], config, tmp_path / "cache")
                assert samples(datasets).shape[1] == SEQ and describes_samples(datasets[0])
                shutil.rmtree(tmp_path / "cache")
    assert outcomes["read"] > 25 and outcomes["refused"] > share_of(MUTATIONS) // 2, outcomes


def broken_caches(file: Path, choose: random.Random) -> None:
    """Change one array of a cache: its header, its numbers, its size."""
    data = bytearray(file.read_bytes())
    what = choose.random()
    if what < 0.3:
        array = np.load(file)
        odd = choose.choice([-1, 0, 1, 5, 6, 100, 2**31 - 1, -(2**31)])
        array.flat[choose.randrange(array.size)] = np.int64(odd).astype(array.dtype)
        np.save(file, array)
        return
    if what < 0.5:
        data[choose.randrange(128)] = choose.randrange(256)
    elif what < 0.7:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif what < 0.85:
        del data[choose.randrange(len(data)) :]
    else:
        array = np.load(file).astype(choose.choice(["f4", "U3", "S8", "i2", "O", "c8"]))
        np.save(file, array, allow_pickle=True)
        return
    put(file, bytes(data))


def test_caches_of_sample_indices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix, cache = tmp_path / "web", tmp_path / "cache"
    write_dataset(prefix, np.uint16)
    config, sized, outcomes = settings(prefix), [(part_of(prefix), 20)], Counter[str]()
    whole = samples(_domain_datasets(sized, config, cache))
    inside = {tuple(row) for row in whole.tolist()}
    kept = {file: file.read_bytes() for file in cache.iterdir()}
    arrays = sorted(file for file in kept if file.suffix == ".npy")
    assert len(arrays) == 3 and _cached_datasets(sized, config, cache) is not None
    for seed in range(share_of(CACHES)):
        choose = random.Random(seed)
        file = choose.choice(arrays)
        broken_caches(file, choose)
        with patience():
            datasets = _cached_datasets(sized, config, cache)
        outcomes["used" if datasets else "refused"] += 1
        if datasets and file.name.endswith("shuffle_index.npy"):
            # the order of the shuffle is nowhere else, but the samples are
            assert {tuple(row) for row in samples(datasets).tolist()} == inside
        elif datasets:
            assert samples(datasets).shape == whole.shape
        put(file, kept[file])
    assert outcomes["refused"] > share_of(CACHES) // 2, outcomes
    assert "built again" in caplog.text


def test_a_cache_runs_nothing(tmp_path: Path) -> None:
    """A pickle in a cache is not opened, under any name that Megatron would load."""
    prefix, cache, marker = tmp_path / "web", tmp_path / "cache", tmp_path / "ran"
    write_dataset(prefix, np.uint16)
    sized: list[tuple[Part, int]] = [(part_of(prefix), 20)]
    _domain_datasets(sized, settings(prefix), cache)
    for file in sorted(cache.glob("*.npy")):
        kept = file.read_bytes()
        np.save(file, np.array([Payload(marker)], object), allow_pickle=True)
        assert _cached_datasets(sized, settings(prefix), cache) is None
        put(file, kept)
    assert not marker.exists()
    np.save(file, np.array([Payload(marker)], object), allow_pickle=True)
    np.load(file, allow_pickle=True)
    assert marker.exists()  # the payload works


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_notes_of_shards_in_place(tmp_path: Path) -> None:
    """The note that names datasets elsewhere, and the numbers of their sequences."""
    write_dataset(tmp_path / "web", np.uint16)
    folder = tmp_path / "shards"
    folder.mkdir()
    counts = {"documents": 3, "tokens": 15, "largest_id": 208}
    splits: dict[str, Any] = {}
    for split, numbers in (("train", [0, 1, 2]), ("heldout", [3, 4, 5])):
        np.save(folder / f"{split}.npy", np.array(numbers, np.int64))
        splits[split] = {**counts, "files": describe_file(folder / f"{split}.npy")}
    splits["heldout"] |= {"tokens": 49, "largest_id": 516}
    files = {
        file.suffix: list(describe_file(file).values())[0]
        for file in (bin_file(tmp_path / "web"), idx_file(tmp_path / "web"))
    }
    source = {"prefix": str(tmp_path / "web"), "sequences": 6, "tokens": 64, "files": files}
    meta = {
        "format": 1, "settings_sha256": "0", "sources": [source], "splits": splits,
        "tokenizer": {"name": "x", "fingerprint": "0", "vocab_size": 512, "eod": 1, "bos": None},
    }  # fmt: skip

    def read() -> None:
        shards = read_shards(folder)
        for split in ("train", "heldout"):
            assert len(shards.stream(split)) == shards.tokens(split)
            shards.digests(split)

    (folder / "meta.json").write_text(json.dumps(meta))
    read()
    survives(read, json_writer(folder / "meta.json", meta), count=1500)
