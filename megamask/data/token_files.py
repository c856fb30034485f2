"""The token files of a domain while they are written, and how far a run came with them.

``{split}.bin`` holds the tokens of a split and ``{split}.lengths`` the tokens of each of its
documents (int32), which become ``{split}.idx`` at the end. ``progress.json`` says how much of both
belongs to files of the corpus that were read to their ends; a later run goes on from there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamask.data.document import START, Reached
from megamask.data.split import HELDOUT, TRAIN
from megamask.data.token_index import write_index
from megamask.errors import ArtifactError
from megamask.storage import lacks, read_json, write_json

PROGRESS = "progress.json"
SPLITS = (TRAIN, HELDOUT)
NO_COUNT = {"documents": 0, "tokens": 0, "bytes": 0, "largest_id": -1}
_NOTED = {
    "settings_sha256": str,
    "files": int,
    "size": int,
    "counts": {split: dict.fromkeys(NO_COUNT, int) for split in SPLITS},
}


def _no_counts() -> dict[str, dict[str, int]]:
    return {split: dict(NO_COUNT) for split in SPLITS}


@dataclass
class Progress:
    """How far the token files of a folder are.

    Attributes:
        reached: how far the corpus was read.
        counts: side -> number of documents, tokens and bytes of text, and the largest token id.
    """

    reached: Reached = START
    counts: dict[str, dict[str, int]] = field(default_factory=_no_counts)


def is_useful(folder: Path) -> bool:
    """Whether a run noted in ``folder`` how far it came."""
    return (folder / PROGRESS).is_file()


def take_up(folder: Path, digest: str) -> None:
    """Empty a folder that was begun with other settings, or that nobody can go on with.

    Args:
        folder: the folder.
        digest: of the settings.
    """
    try:
        noted = read_json(folder / PROGRESS, "")
        fits = not lacks(noted, _NOTED) and noted["settings_sha256"] == digest
    except ArtifactError:
        fits = False
    if not fits:
        shutil.rmtree(folder)
        folder.mkdir()


class TokenFiles:
    """Writes the token files of a folder. The object is a context manager.

    Args:
        folder: the folder, after ``take_up``.
        dtype: of a token.
        digest: of the settings.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], digest: str) -> None:
        self._folder, self._dtype, self._digest = folder, dtype, digest
        self.progress = self._noted()
        self._files: dict[str, list[Any]] = {}

    def __enter__(self) -> TokenFiles:
        for split in SPLITS:
            self._files[split] = []
            for suffix, size in self._sizes(self.progress.counts[split]).items():
                file = (self._folder / f"{split}{suffix}").open("ab")
                self._files[split].append(file)
                file.truncate(size)
                file.seek(size)
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._files.values():
            for file in files:
                file.close()

    def add(
        self, split: str, ids: NDArray[Any], lengths: NDArray[np.int32], text_bytes: int
    ) -> None:
        """Write documents of a split.

        Args:
            split: the split.
            ids: the tokens of the documents, one after another.
            lengths: tokens of each document; none is 0.
            text_bytes: bytes of their text.
        """
        if not len(lengths):
            return
        tokens, of_documents = self._files[split]
        tokens.write(ids.tobytes())
        of_documents.write(lengths.tobytes())
        count = self.progress.counts[split]
        count["documents"] += len(lengths)
        count["tokens"] += len(ids)
        count["bytes"] += text_bytes
        count["largest_id"] = max(count["largest_id"], int(ids.max()))

    def note(self, reached: Reached) -> None:
        """Note how far the corpus was read; a run that is killed later goes on from here."""
        for files in self._files.values():
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        self.progress.reached = reached
        value = {"settings_sha256": self._digest, **asdict(reached), "counts": self.progress.counts}
        write_json(self._folder / PROGRESS, value)

    def finish(self) -> None:
        """Write the index of each split, and leave only files of the finished folder."""
        self.__exit__()
        (self._folder / PROGRESS).unlink(missing_ok=True)  # first: it speaks of the other files
        for split in SPLITS:
            lengths = self._folder / f"{split}.lengths"
            write_index(self._folder / split, self._dtype, np.fromfile(lengths, np.int32))
        for split in SPLITS:
            (self._folder / f"{split}.lengths").unlink()

    def _noted(self) -> Progress:
        """What a killed run noted; nothing if the files are shorter than it says."""
        if not is_useful(self._folder):
            return Progress()
        noted = read_json(self._folder / PROGRESS, "")
        for split in SPLITS:
            for suffix, size in self._sizes(noted["counts"][split]).items():
                file = self._folder / f"{split}{suffix}"
                if not file.is_file() or file.stat().st_size < size:
                    return Progress()
        return Progress(Reached(noted["files"], noted["size"]), noted["counts"])

    def _sizes(self, count: dict[str, int]) -> dict[str, int]:
        """Ending of a file of a split -> its bytes."""
        return {
            ".bin": count["tokens"] * self._dtype.itemsize,
            ".lengths": count["documents"] * np.dtype(np.int32).itemsize,
        }
