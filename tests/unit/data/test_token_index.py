"""Shards whose files were changed after they were written: refused before Megatron reads them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megamask.config import Config, run_paths
from megamask.data.blend import train_dataset
from megamask.data.heldout import heldout_windows
from megamask.data.token_index import HEADER, token_type
from megamask.errors import ArtifactError
from megamask.verbs import tokenize


def changed(file: Path, at: int, code: str, value: int) -> None:
    data = bytearray(file.read_bytes())
    struct.pack_into(code, data, at, value)
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("at", "code", "value", "said"),
    [
        (0, "<Q", 0, "magic bytes"),
        (9, "<Q", 9, "version 9"),
        (17, "<B", 99, "token type 99"),
        (17, "<B", 7, "token type 7"),  # float32
        (17, "<B", 3, "other sequences"),  # int16, as wide as the type that was written
        (17, "<B", 5, "no whole number|sequence|other sequences"),  # int64
        (18, "<Q", 2**60, "need"),
        (26, "<Q", 2**60, "need"),
        (HEADER.size, "<i", 2**31 - 1, "sequence 0 has"),
        (HEADER.size, "<i", -1, "sequence 0 has"),
        (HEADER.size, "<i", 0, "other sequences"),
    ],
)
def test_an_index_that_was_changed(
    two_domains: Callable[..., Config], at: int, code: str, value: int, said: str
) -> None:
    config = two_domains()
    tokenize.run(config)
    for split in ("train", "heldout"):
        file = run_paths(config).shards / "a" / f"{split}.idx"
        whole = file.read_bytes()
        changed(file, at, code, value)
        with pytest.raises(ArtifactError, match=rf"{split}\.idx.*({said}).*verb tokenize"):
            if split == "train":
                train_dataset(config, 10, 32, seed=3)
            else:
                heldout_windows(config, "a", 20, None)
        file.write_bytes(whole)


def test_lengths_that_are_all_zero(two_domains: Callable[..., Config]) -> None:
    """Megatron would look for the first token for ever."""
    config = two_domains()
    tokenize.run(config)
    file = run_paths(config).shards / "a" / "train.idx"
    data = bytearray(file.read_bytes())
    count = HEADER.unpack(data[: HEADER.size])[3]
    data[HEADER.size : HEADER.size + 4 * count] = bytes(4 * count)
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="other sequences"):
        train_dataset(config, 10, 32, seed=3)


def test_tokens_that_were_changed(two_domains: Callable[..., Config]) -> None:
    """An id that nobody wrote would end the model with an index error."""
    config = two_domains()
    tokenize.run(config)
    for name in ("a", "b"):
        folder = run_paths(config).shards / name
        whole = {split: (folder / f"{split}.bin").read_bytes() for split in ("train", "heldout")}
        for split, data in whole.items():
            tokens = np.frombuffer(data, np.uint16).copy()
            tokens[::7] = 60_000
            (folder / f"{split}.bin").write_bytes(tokens.tobytes())
        said = r"token id 60000.*verb tokenize"
        for blend in ({"a": 1, "b": 1}, {name: 1}):  # two sources and one
            samples = train_dataset(two_domains(blend=blend), 10, 32, seed=3)
            with pytest.raises(ArtifactError, match=rf"/{name}/train\.bin.*{said}"):
                [samples[number] for number in range(10)]
        with pytest.raises(ArtifactError, match=rf"/{name}/heldout\.bin.*{said}"):
            heldout_windows(config, name, 20, None)
        for split, data in whole.items():
            (folder / f"{split}.bin").write_bytes(data)


def test_an_id_that_another_domain_alone_has(two_domains: Callable[..., Config]) -> None:
    config = two_domains()
    tokenize.run(config)
    note = run_paths(config).shards / "b" / "meta.json"
    meta = json.loads(note.read_text())
    meta["splits"]["train"]["largest_id"] = 100
    note.write_text(json.dumps(meta))
    samples = train_dataset(config, 10, 32, seed=3)
    with pytest.raises(ArtifactError, match=r"/b/train\.bin.*the largest that was written is 100"):
        [samples[number] for number in range(10)]


def test_the_type_of_a_token_is_that_of_megatron() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (1, 2**8, 65499, 65500, 2**16, 2**18):
        assert token_type(size) == np.dtype(DType.optimal_dtype(size))
