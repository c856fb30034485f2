"""A safetensors file of 64-bit words, written tensor by tensor.

The bytes are those of ``safetensors.numpy.save``, which takes all tensors at once. The sizes are
known before the words, so each tensor goes to its place as it comes, in any order, and the header
is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from megamask.masks.codec import Words
from megamask.storage import atomic_file

_WIDTH = 8  # bytes of a word
_NUMBERS = 64  # bytes for the numbers of a tensor in the header, a multiple of 8


def write_words(
    path: Path,
    counts: Mapping[str, int],
    tensors: Iterable[tuple[str, Words]],
    metadata: Callable[[Mapping[str, str]], str],
    at_most: bool = False,
) -> None:
    """Write the file atomically, with two tensors in memory at most: a thread takes the digest of
    a tensor, which is half of the work, while it goes to the disk and the next is made.

    Args:
        path: the file.
        counts: name -> number of words of every tensor.
        tensors: name and words of every tensor, in any order.
        metadata: the text under the key ``megamask``, from name -> sha256 of the words in
            hexadecimal. Its length must not depend on the digests.
        at_most: whether ``counts`` are upper bounds. Then a tensor lies behind the one that came
            before it, and the header ends with more spaces.
    """
    blank, sizes = hashlib.sha256().hexdigest(), dict(counts)
    offsets, hashes = _offsets(counts), dict[str, Future[Any]]()
    begin = len(_head(sizes, offsets, metadata(dict.fromkeys(counts, blank))))
    begin += at_most * _NUMBERS * len(counts)
    end = 0
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as stream,
        ThreadPoolExecutor(1) as hasher,
    ):
        for name, words in tensors:
            assert words.shape == (counts[name],) or (at_most and words.size < counts[name])
            if at_most:
                offsets[name], sizes[name], end = end, words.size, end + words.size * _WIDTH
            wait(hashes.values())  # so that the words of two tensors at most are in memory
            content = words.astype("<u8", copy=False).view(np.uint8).data
            hashes[name] = hasher.submit(hashlib.sha256, content)
            stream.seek(begin + offsets[name])
            stream.write(content)
        digests = {name: one.result().hexdigest() for name, one in hashes.items()}
        assert digests.keys() == counts.keys()
        head = _head(sizes, offsets, metadata(digests), begin)
        assert len(head) == begin
        stream.seek(0)
        stream.write(head)


def _offsets(counts: Mapping[str, int]) -> dict[str, int]:
    """Name -> first byte of a tensor in the data of the file. Tensors lie in the order of names."""
    found, end = {}, 0
    for name in sorted(counts):
        found[name] = end
        end += counts[name] * _WIDTH
    return found


def _head(
    counts: Mapping[str, int], offsets: Mapping[str, int], metadata: str, length: int = 0
) -> bytes:
    """The header with its length, padded with spaces to a multiple of 8 bytes, or to ``length``."""
    entries: dict[str, object] = {"__metadata__": {"megamask": metadata}}
    for name, first in offsets.items():
        place = [first, first + counts[name] * _WIDTH]
        entries[name] = {"dtype": "U64", "shape": [counts[name]], "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (length - 8 - len(text) if length else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text
