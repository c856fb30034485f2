"""A table of a report, and the kind of result that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megamask.report.own_rows import OwnMasks


@dataclass(frozen=True)
class TablePicture:
    """A picture below a table.

    Attributes:
        name: of the PNG file in ``pictures/``, without its ending.
        title, caption: the texts of the picture.
        draw: draws it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class ResultTable:
    """A table of a report, as text, with its pictures.

    Attributes:
        title: heading of the table.
        header: names of the columns; the first column holds the name of the row.
        rows: (method or other key, cells) of every row. The row ``learned`` is emphasized.
        notes: sentences below the table: units, and the protocol of the numbers.
        pictures: the pictures below the notes, named in ``ResultKind.pictures``.
        is_text: whether the cells are words and not numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str] = ()
    pictures: Sequence[TablePicture] = ()
    is_text: bool = False


@dataclass(frozen=True)
class ResultKind:
    """A file of a run folder that becomes a table.

    Attributes:
        file: its name.
        read: reads and checks the file, and leaves out, or marks in a note, what was measured on
            other masks than those of the run; raises ``ArtifactError`` with the verb that writes
            the file.
        pictures: names of the pictures that its table may have: a report deletes the PNG file of
            each picture that the table does not have any more.
    """

    file: str
    read: Callable[[Path, OwnMasks], ResultTable]
    pictures: tuple[str, ...] = ()
