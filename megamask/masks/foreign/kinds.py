"""The registry of foreign masks. A new kind is one file and one line here."""

from __future__ import annotations

from pathlib import Path

from megamask.errors import ArtifactError
from megamask.file_kinds import wrong_file
from megamask.masks.foreign import (
    bitmask_folder,
    layer_files,
    maskllm_npz,
    maskllm_pt,
    patch_npz,
    pruned_folder,
)
from megamask.masks.foreign.kind import Kind

# The first kind that fits a path reads it: a kind that knows its parts stands before a kind that
# takes any file or folder of the same name.
KINDS: tuple[Kind, ...] = (
    patch_npz.KIND,
    maskllm_npz.KIND,
    maskllm_pt.KIND,
    layer_files.MASKPRO,
    layer_files.PROXSPARSE,
    bitmask_folder.KIND,
    pruned_folder.KIND,
)


def kind_of(path: Path) -> Kind:
    """The kind of foreign masks at a path.

    Raises:
        ArtifactError: there is nothing at the path, or something that no kind reads.
    """
    found = next((kind for kind in KINDS if kind.fits(path)), None)
    if found is None:
        known = " or ".join(kind.what for kind in KINDS)
        raise wrong_file(path, "masks of another tool", f"Name {known}.")
    if not path.exists():
        raise ArtifactError(path, "is missing", "Check the path.")
    return found
