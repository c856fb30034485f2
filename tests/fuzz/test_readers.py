"""Whatever a file holds, a reader reads it or says one error of ours: no other exception leaves.

Bounded and seeded: every reader gets a valid file, mutated ``MUTATIONS`` times. A mutation changes
values of JSON by type, drops or doubles keys, or changes bytes.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import load_config
from megamask.data.shards import FORMAT, read_shards
from megamask.errors import MegamaskError
from megamask.masks.file import load_masks, save_masks
from megamask.masks.header import header_digest
from megamask.model.checkpoint import read_note
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = 3000
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("inf"),
    float("nan"), "", "x", "../x", "\ud83d", "\x00", "2:4", "1e9", "uint16", "float16", [], [1], {},
    {"a": 1}, [[[]]], {"x": {"y": []}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def mutated(value: Any, choose: random.Random) -> Any:
    """A copy with one to three odd values, dropped keys or new keys."""
    value = copy.deepcopy(value)
    for _ in range(choose.randint(1, 3)):
        *way, last = choose.choice([path for path in places(value) if path] or [(None,)])
        if last is None:
            return choose.choice(ODD)
        place = value
        for key in way:
            place = place[key]
        what = choose.random()
        if what < 0.15 and isinstance(place, dict):
            del place[last]
        elif what < 0.25 and isinstance(place, dict):
            place[str(choose.choice(ODD))] = choose.choice(ODD)
        else:
            place[last] = copy.deepcopy(choose.choice(ODD))
    return value


def mutated_bytes(data: bytes, choose: random.Random) -> bytes:
    """A copy with some other bytes, a part cut out, or an end cut off."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 6)):
        changed[choose.randrange(len(changed))] = choose.randrange(256)
    if choose.random() < 0.3:
        start = choose.randrange(len(changed))
        del changed[start : start + choose.choice([1, 7, len(changed)])]
    return bytes(changed)


def survives(
    read: Callable[[], Any], write: Callable[[random.Random], None], count: int = MUTATIONS
) -> Counter[str]:
    """How often a mutated file was read and refused."""
    outcomes: Counter[str] = Counter()
    for seed in range(count):
        write(random.Random(seed))
        try:
            read()
            outcomes["read"] += 1
        except MegamaskError:
            outcomes["refused"] += 1
        except Exception as error:  # what this test is about
            raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error
    assert outcomes["refused"] > count // 20, outcomes
    return outcomes


def json_writer(path: Path, value: Any) -> Callable[[random.Random], None]:
    def write(choose: random.Random) -> None:
        if choose.random() < 0.8:
            path.write_bytes(json.dumps(mutated(value, choose)).encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(mutated_bytes(json.dumps(value).encode(), choose))

    return write


def test_weights_notes(tmp_path: Path) -> None:
    note = {"fingerprint": "a" * 64, "dtype": "bfloat16", "padded_vocab": 512, "source": "x"}
    survives(lambda: read_note(tmp_path), json_writer(tmp_path / "megamask.json", note))


def test_shard_notes(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.bin").write_bytes(b"12345678")
        (tmp_path / f"{name}.idx").write_bytes(b"12345678")
    files = {
        split: {f"{split}{end}": {"size": 8, "sha256": "0" * 64} for end in (".bin", ".idx")}
        for split in ("train", "heldout")
    }
    counts = {"documents": 1, "tokens": 4, "bytes": 8, "largest_id": 3}
    meta = {
        "format": FORMAT,
        "domain": "x", "settings_sha256": "0", "dtype": "uint16", "append_eod": True,
        "tokenizer": {"name": "x", "fingerprint": "0", "vocab_size": 512, "eod": 1, "bos": None},
        "splits": {split: {**counts, "files": files[split]} for split in files},
    }  # fmt: skip
    survives(lambda: read_shards(tmp_path), json_writer(tmp_path / "meta.json", meta))


@pytest.mark.parametrize(
    "name", ["tiny-llama", "llama3-8b", "gemma-3-4b", "nemotron-4-15b", "qwen2.5-7b"]
)
def test_model_configs(tmp_path: Path, name: str) -> None:
    known = ROOT / "megamask" / "weights" / "known" / f"{name}.json"
    source = known if known.exists() else ROOT / "configs" / "models" / f"{name}.json"
    config = json.loads(source.read_text())
    write = json_writer(tmp_path / "config.json", config)
    survives(lambda: read_architecture(tmp_path), write)


def test_mask_files(tmp_path: Path) -> None:
    path, pattern = tmp_path / "mask.safetensors", Pattern(2, 4)
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    masks = {name: pattern.best(scores) for name in ("model.layers.0.a", "model.layers.0.b")}
    save_masks(path, masks, pattern, fingerprint="f", method="magnitude")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["megamask"])

    def write(choose: random.Random) -> None:
        if choose.random() < 0.5:
            path.write_bytes(mutated_bytes(data, choose))
            return
        changed = mutated(inner, choose)
        if isinstance(changed, dict):  # a checksum that fits, so that the values are looked at
            changed["sha256"] = header_digest(changed)
        text = {**header, "__metadata__": {"megamask": json.dumps(changed)}}
        encoded = json.dumps(text).encode()
        encoded += b" " * (-len(encoded) % 8)
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])

    survives(lambda: load_masks(path).verify(), write)


@pytest.mark.parametrize("recipe", ["debug", "quickstart", "maskllm-llama2-7b"])
def test_recipes(tmp_path: Path, recipe: str) -> None:
    import yaml

    text = (ROOT / "configs" / "recipes" / f"{recipe}.yaml").read_text()
    value, path = yaml.safe_load(text), tmp_path / "recipe.yaml"

    def write(choose: random.Random) -> None:
        if choose.random() < 0.5:
            path.write_bytes(json.dumps(mutated(value, choose)).encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(mutated_bytes(text.encode(), choose))

    survives(lambda: load_config(path), write, count=1500)
