"""The registry of foreign masks. A new kind is one file and one line here."""

from __future__ import annotations

from pathlib import Path

from megamask.errors import ArtifactError
from megamask.file_kinds import wrong_file
from megamask.masks.foreign import maskllm_npz, pruned_folder
from megamask.masks.foreign.kind import Kind

KINDS: tuple[Kind, ...] = (maskllm_npz.KIND, pruned_folder.KIND)


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
