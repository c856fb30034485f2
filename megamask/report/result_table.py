"""A table of a report, and the kind of result that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ResultTable:
    """A table of a report, as text.

    Attributes:
        title: heading of the table.
        header: names of the columns; the first column holds the name of the row.
        rows: (method or other key, cells) of every row. The row ``learned`` is emphasized.
        notes: sentences below the table: units, and the protocol of the numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ResultKind:
    """A file of a run folder that becomes a table.

    Attributes:
        file: its name.
        read: reads and checks the file; raises ``ArtifactError`` with the verb that writes it.
    """

    file: str
    read: Callable[[Path], ResultTable]
