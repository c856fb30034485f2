"""The finished parts of a recovery, kept on disk until the whole is done, so that a killed run goes
on with the next part.

A part holds tensors of this rank's shards, so a run of another tensor parallel size starts anew.
The replicas of a shard have equal tensors, and the first of them writes. The file of a snapshot has
the number of its step in its name: a kill while the ranks write leaves some of them a step behind,
and the run goes on from the newest step that all ranks have.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megamask import storage
from megamask.config.nested import what_differs
from megamask.errors import ArtifactError
from megamask.parallel.mesh import Mesh

log = logging.getLogger(__name__)
MADE_FROM = "made_from.json"
NOTE = "note"  # of a part's metadata


class Unfinished:
    """A folder of parts.

    Args:
        folder: the folder; parts in it that were made from anything else are deleted.
        made_from: everything that decides the parts, as JSON values.
        mesh: process groups of this rank; all ranks must make the object.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any], mesh: Mesh) -> None:
        self.folder, self.mesh = folder, mesh
        wanted = storage.as_read({"made_from": made_from, "tp": mesh.tp})
        if mesh.is_main and (other := what_differs(self._made_from(), wanted)):
            if folder.exists():
                log.info("%s: of other %s: starts anew", folder, other)
            shutil.rmtree(folder, ignore_errors=True)
            if any(folder.glob("*.safetensors")):  # it would pass for a part of this recovery
                problem = "holds parts of another recovery that cannot be deleted"
                raise ArtifactError(folder, problem, "Delete the folder.")
            storage.require_writable(folder)
            storage.write_json(folder / MADE_FROM, wanted)
        mesh.barrier()

    def _made_from(self) -> dict[str, Any]:
        try:
            return storage.read_object(self.folder / MADE_FROM, "", {})
        except ArtifactError:
            return {}

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}-{self.mesh.tp_rank}.safetensors"

    def load(self, part: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """The tensors, in host memory, and the note of a part; None on all ranks where a rank lacks
        its shard.
        """
        found = None
        try:
            with safe_open(self._path(part), framework="pt") as file:
                note = json.loads((file.metadata() or {})[NOTE])
                names: list[str] = file.keys()
                found = {name: file.get_tensor(name) for name in names}, note
        except (OSError, SafetensorError, KeyError, ValueError):
            pass  # not there, or torn: the part is made again
        return None if self.mesh.any(found is None) else found

    def save(self, part: str, tensors: Mapping[str, torch.Tensor], note: Any) -> None:
        """Write a part, whole or not at all. All ranks must call this method.

        Raises:
            ArtifactError: the disk is full, or the folder cannot be written.
        """
        if self.mesh.dp_rank == 0:
            whole = {name: one.contiguous() for name, one in tensors.items()}
            with storage.atomic_file(self._path(part)) as temporary:
                save_file(whole, temporary, {NOTE: json.dumps(note)})
        self.mesh.barrier()

    def save_step(
        self, part: str, step: int, tensors: Mapping[str, torch.Tensor], note: Any
    ) -> None:
        """Write the snapshot of a part after ``step`` steps, then delete those of fewer steps. All
        ranks must call this method.

        Raises:
            ArtifactError: the disk is full, or the folder cannot be written.
        """
        whole = self._of_step(part, step)
        self.save(whole, tensors, note)  # with a barrier: now all ranks have this step
        if self.mesh.dp_rank == 0:
            for path in self.folder.glob(f"{part}-*-{self.mesh.tp_rank}.safetensors"):
                if path != self._path(whole):
                    with suppress(OSError):  # an older step that stays is not the newest
                        path.unlink()

    def load_newest(self, part: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """The newest snapshot of a part that all ranks have, as ``load`` gives it; None where there
        is none. All ranks must call this method.
        """
        names = [path.name for path in self.folder.glob(f"{part}-*.safetensors")]
        found = (re.fullmatch(rf"{part}-(\d+)-\d+\.safetensors", name) for name in names)
        steps = self.mesh.from_main(sorted({int(one[1]) for one in found if one}, reverse=True))
        snapshots = (self.load(self._of_step(part, step)) for step in steps)
        return next((one for one in snapshots if one is not None), None)

    def _of_step(self, part: str, step: int) -> str:
        return f"{part}-{step:08d}"

    def finish(self) -> None:
        """Delete the folder: the whole is done. All ranks must call this method."""
        self.mesh.barrier()
        if self.mesh.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
