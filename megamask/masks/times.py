"""The time that a mask took, in a file beside the mask: equal masks have equal mask files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.storage import lacks, read_json, write_json

if TYPE_CHECKING:
    from megamask.masks.file import MaskSet

SECONDS = "seconds"


def times_path(mask_file: Path) -> Path:
    """The file of the time that belongs to a mask file: beside it, METHOD.times.json."""
    return mask_file.with_suffix(".times.json")


def write_seconds(mask_file: Path, seconds: float) -> None:
    """Note the seconds that a mask took. Call this before the mask file is written: where the mask
    is there, so is its time.
    """
    write_json(times_path(mask_file), {SECONDS: round(seconds, 2)})


def forget_seconds(mask_file: Path) -> None:
    """Delete the seconds of a mask file that is no longer there, before another takes its name."""
    times_path(mask_file).unlink(missing_ok=True)


def note_seconds(mask_file: Path, seconds: float | None) -> None:
    """Note the seconds that a mask took, or that nobody knows them."""
    if seconds is None:
        forget_seconds(mask_file)
    else:
        write_seconds(mask_file, seconds)


def seconds_of(masks: MaskSet) -> float | None:
    """The seconds that a mask took; None where nothing says so. Mask files of before say so in
    their header.

    Raises:
        ArtifactError: the file beside the mask cannot be read.
    """
    path = times_path(masks.path)
    facts: Any = read_json(path, "Delete it.") if path.is_file() else masks.meta.get("data")
    known = not lacks(facts, {SECONDS: (int, float)})
    return float(facts[SECONDS]) if known else None
