"""The cache of Megatron's sample indices, checked before and after Megatron reads it.

Megatron loads the ``.npy`` files of a cache with pickles allowed, and believes every number in
them. A run folder may come from somebody else, or from a process that was killed, so a cache is
used only if it holds plain integers that describe the very samples of the shards. Any other cache
is built again: it is derived from the shards and the settings alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy")
CHUNK = 2**20


def holds_plain_integers(folders: Sequence[Path]) -> bool:
    """Whether the folders of a cache hold the files of their datasets and nothing else, and every
    array is one of integers that numpy maps without unpickling anything.

    Args:
        folders: the folder of each dataset; a folder may be that of several.
    """
    return all(
        folder.is_dir() and _holds(folder, datasets, set(folders))
        for folder, datasets in Counter(folders).items()
    )


def _holds(folder: Path, datasets: int, folders: set[Path]) -> bool:
    files = [file for file in folder.iterdir() if file not in folders]
    kinds = Counter(file.name.rpartition("-")[2] for file in files)
    return kinds == dict.fromkeys(KINDS, datasets) and all(
        _is_plain(file) for file in files if file.suffix == ".npy"
    )


def _is_plain(file: Path) -> bool:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception:  # whatever a torn or hostile header makes numpy raise: the file is not used
        return False
    return isinstance(array, np.ndarray) and array.dtype.kind in "iu"


def describes_samples(dataset: Any) -> bool:
    """Whether the indices of a GPTDataset describe samples of its own documents.

    Sample k of the shuffled order begins at token k x S of the documents in the order of the
    document index, S being the sequence length, and is one token longer than S, for the labels.
    """
    order, samples, shuffled = dataset.document_index, dataset.sample_index, dataset.shuffle_index
    count = samples.shape[0] - 1
    if order.ndim != 1 or samples.ndim != 2 or samples.shape[1] != 2 or count < 1:
        return False
    if shuffled.shape != (count,) or count < dataset.num_samples:
        return False
    lengths = dataset.dataset.sequence_lengths
    allowed = np.zeros(len(lengths), bool)
    allowed[dataset.indices] = True
    begins = np.zeros(len(order) + 1, np.int64)
    for start in range(0, len(order), CHUNK):
        part = order[start : start + CHUNK]
        if not (_is_within(part, len(lengths)) and allowed[part].all()):
            return False
        begins[start + 1 : start + 1 + len(part)] = lengths[part]
    np.cumsum(begins, out=begins)
    return _is_permutation(shuffled, count) and _are_placed(
        samples, begins, dataset.config.sequence_length
    )


def _is_permutation(numbers: Any, count: int) -> bool:
    seen = np.zeros(count, bool)
    for start in range(0, count, CHUNK):
        part = numbers[start : start + CHUNK]
        if not _is_within(part, count):
            return False
        seen[part] = True
    return bool(seen.all())


def _are_placed(samples: Any, begins: Any, length: int) -> bool:
    """Whether row k of ``samples``, (document, offset) pairs, is token k x ``length``."""
    for start in range(0, len(samples), CHUNK):
        part = samples[start : start + CHUNK]
        if not (_is_within(part[:, 0], len(begins) - 1) and (part[:, 1] >= 0).all()):
            return False
        document = part[:, 0].astype(np.int64)
        at = begins[document] + part[:, 1]
        wanted = (start + np.arange(len(part), dtype=np.int64)) * length
        if (at != wanted).any() or (at > begins[document + 1]).any():
            return False
    return bool((len(samples) - 1) * length < begins[-1])


def _is_within(numbers: Any, end: int) -> bool:
    return not len(numbers) or bool(numbers.min() >= 0 and numbers.max() < end)
