"""Masks by the name that a user gives them: a mask of the run, a mask file, a snapshot, or a folder
of snapshots.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from megamask.config import Config, RunPaths, run_paths
from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet, load_masks
from megamask.masks.from_snapshot import NOTE, load_snapshot, newest_snapshot
from megamask.storage import read_json
from megamask.weights.architecture import Architecture, read_architecture


def open_masks(text: str, config: Config, arch: Architecture | None = None) -> MaskSet:
    """Open masks by name or path, checked for being whole.

    Args:
        text: the name of a mask of this run (``sparsegpt``, ``learned``), a mask file, a snapshot,
            or a folder of snapshots (the newest).
        config: names the run.
        arch: of the model; None looks for it: a snapshot names its linears as Megatron does.

    Raises:
        ArtifactError: nothing there, or torn.
    """
    path = mask_path(text, run_paths(config))
    if path.is_dir():
        return load_snapshot(
            path, arch or _architecture_of(newest_snapshot(path), run_paths(config))
        )
    masks = load_masks(path)
    masks.check_whole()
    return masks


def mask_path(text: str, paths: RunPaths) -> Path:
    """The file or folder that ``text`` means: a mask of this run where there is one of that name,
    else a path.

    Raises:
        ArtifactError: neither.
    """
    path, named = Path(text), paths.mask(text)
    is_path = "/" in text or text.endswith(".safetensors")
    if not is_path and named.exists():
        return named
    if path.exists():
        return path
    if is_path:
        raise ArtifactError(
            path, "is missing", "Check the path: a mask file, a snapshot, or a folder of snapshots."
        )
    have = sorted(file.stem for file in paths.masks.glob("*.safetensors"))
    near = difflib.get_close_matches(text, have, n=1)
    hint = (
        f"Did you mean {near[0]}?"
        if near
        else f"This run has {', '.join(have)}."
        if have
        else "This run has no masks yet."
    )
    fix = f"Name a mask of this run, a mask file, a snapshot or a folder of snapshots, or run the verb that makes it. {hint}"
    raise ArtifactError(named, "is missing", fix)


def _architecture_of(snapshot: Path, paths: RunPaths) -> Architecture:
    """From the run that the snapshot belongs to, or the model that it was learned on, or else the
    configured run.
    """
    places = [
        *(folder / "weights" for folder in snapshot.resolve().parents[2:3]),
        paths.weights,
        paths.hf,
    ]
    try:
        settings = json.loads((snapshot / NOTE).read_text())["settings"]
        hf = settings["model.hf"] if "model.hf" in settings else settings["model"]["hf"]
        places.insert(1, Path(hf))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a torn note is told of when the snapshot is opened; hf may not be set
    for folder in places:
        if (folder / "config.json").exists():
            return read_architecture(folder)
    problem = "was learned on a model whose config.json is not found"
    raise ArtifactError(snapshot, problem, "Set model.hf to the Hugging Face folder of that model.")


def own_weights(masks: MaskSet, paths: RunPaths) -> Path | None:
    """The folder of Megatron weights that a mask was made with, where these are not the model's.

    A method that updates the kept weights, such as ``sparsegpt_update``, writes a mask and weights
    that belong together: measured and handed out are both or neither.

    Args:
        masks: masks of the run or of a mask file. A file RUN/masks/METHOD.safetensors belongs to
            the weights in RUN.
        paths: of the configured run, where the weights are looked for if the file lies elsewhere.

    Raises:
        ArtifactError: the weights are missing, or were made with another mask.
    """
    if not masks.has_own_weights:
        return None
    folder = masks.path.parent.parent / f"weights-{masks.method}"
    if masks.path.parent.name != "masks" or not folder.is_dir():
        folder = paths.updated_weights(masks.method)
    fix = f"Delete the mask {masks.method} and run the verb prune again, in the run of that mask."
    if not folder.is_dir():
        problem = f"is missing: the mask {masks.path} belongs to these updated weights"
        raise ArtifactError(folder, problem, fix)
    note = read_json(folder / NOTE, fix)
    about = (note.get("fingerprint"), note.get("method")) if isinstance(note, dict) else None
    if about != (masks.fingerprint, masks.method):
        raise ArtifactError(folder, f"does not belong to the mask {masks.path}", fix)
    return folder
