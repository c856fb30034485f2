"""Masks for work that takes long."""

from __future__ import annotations

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
