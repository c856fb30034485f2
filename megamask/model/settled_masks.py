"""Masks for work that takes long."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megamask.config.published import without_places
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.masks.from_snapshot import SnapshotMasks
from megamask.parallel.mesh import Mesh


def settled(masks: MaskSet, file: Path, mesh: Mesh) -> MaskSet:
    """The same masks, from a file that stays: those of a snapshot are copied to ``file``, because a
    run that still learns deletes its older snapshots. All ranks must call this function.

    Raises:
        ArtifactError: the snapshot is gone already, or the file cannot be written.
    """
    if not isinstance(masks, SnapshotMasks):
        return masks
    if mesh.is_main:
        save_masks(
            file,
            masks,
            masks.patterns,
            fingerprint=masks.fingerprint,
            method=masks.method,
            data=without_places(masks.meta["data"]),
            float16_fingerprints=masks.fingerprints[1:],
        )
    mesh.barrier()
    return load_masks(file)


@contextmanager
def all_settled(
    masks: Mapping[str, MaskSet], folder: Path, mesh: Mesh
) -> Iterator[dict[str, MaskSet]]:
    """``settled`` for named masks, with their files in a folder of this process in ``folder``, for
    several processes may measure masks of a run. It is deleted at the end. All ranks must enter.
    """
    own = folder / str(mesh.from_main(uuid.uuid4().hex))
    files = {name: own / f"{number}.safetensors" for number, name in enumerate(masks)}
    try:
        if mesh.is_main and any(isinstance(one, SnapshotMasks) for one in masks.values()):
            own.mkdir(parents=True)
        yield {name: settled(one, files[name], mesh) for name, one in masks.items()}
    finally:
        if mesh.is_main:
            shutil.rmtree(own, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process measures, or there is no folder
                folder.rmdir()
