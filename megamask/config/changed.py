"""Settings that changed while a run learned: the record in snapshots, masks and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megamask.storage import lacks

CHANGES = "changes"  # the key of the record in notes and headers
_REQUIRED = {"step": int, "time": str, "setting": str}


@dataclass(frozen=True)
class Changed:
    """A setting that a resumed run changed.

    Attributes:
        step: the step of the snapshot that was resumed; the next step was the first with ``after``.
        time: when, UTC, as ISO 8601.
        setting: its dotted key.
        before, after: its values, as JSON values.
    """

    step: int
    time: str
    setting: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.setting} {self.before} -> {self.after} after step {self.step} ({self.time})"


def read_changes(note: Mapping[str, Any]) -> list[Changed]:
    """The record in a note or header; what is no entry of a record is left out."""
    found = note.get(CHANGES)
    entries = [one for one in found if not lacks(one, _REQUIRED)] if isinstance(found, list) else []
    facts = ("step", "time", "setting", "before", "after")
    return [Changed(*(one.get(fact) for fact in facts)) for one in entries]


def write_changes(changes: list[Changed]) -> dict[str, Any]:
    """The record as a part of a note or header; nothing where nothing changed."""
    return {CHANGES: [asdict(one) for one in changes]} if changes else {}
