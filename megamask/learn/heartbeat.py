"""The sign of life of a learning run: the file ``heartbeat.json`` in its folder."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from megamask.leftovers import temporary_name
from megamask.process.holder import Holder

NAME = "heartbeat.json"
State: TypeAlias = Literal["starting", "learning", "interrupted", "finished", "failed"]


@dataclass(frozen=True)
class Heartbeat:
    """Where a run stands. Rank 0 writes this after every step.

    Attributes:
        state: what the run does, or how it ended. A run that was killed leaves its last state.
        step: steps that are done.
        steps: steps of the whole run.
        time: when this was written, UTC, in ISO form.
        holder: rank 0 of the run.
        world: number of ranks.
    """

    state: State
    step: int
    steps: int
    time: str
    holder: Holder
    world: int

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``; a failure is passed over, for it must not end a run."""
        temporary = temporary_name(folder / NAME)
        # No fsync: after a crash of the machine an old heartbeat is as good as none.
        with contextlib.suppress(OSError):
            try:
                temporary.write_text(json.dumps(asdict(self)) + "\n")
                os.replace(temporary, folder / NAME)
            finally:
                temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> Heartbeat | None:
        """The heartbeat of the run in ``folder``; None where none can be read."""
        kinds = {"state": str, "step": int, "steps": int, "time": str, "world": int}
        try:
            if not (folder / NAME).is_file():
                return None
            value = json.loads((folder / NAME).read_text())
            holder = Holder.read(value["holder"])
            found = {key: value[key] for key in kinds}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if holder is None or any(type(found[key]) is not kind for key, kind in kinds.items()):
            return None
        return cls(holder=holder, **found) if found["state"] in get_args(State) else None
