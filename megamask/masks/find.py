"""Masks by the text that a user writes: the name of a mask of the run, or the path of a mask file,
of a snapshot or of a folder of snapshots.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import get_args

from megamask.config import Config, RunPaths, run_paths
from megamask.config.recover_tree import RecoveryName
from megamask.errors import ArtifactError, ConfigError
from megamask.masks.base_weights import stored_weights
from megamask.masks.file import MaskSet, load_masks
from megamask.masks.from_snapshot import load_snapshot, newest_snapshot
from megamask.masks.identity import belong_together, outdated, recovery_of, way_to_remake
from megamask.safe_checkpoint import NOTE
from megamask.storage import read_json, read_object, real_path, require_writable
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.base_model import base_model
from megamask.weights.model_identity import OTHER_PARTS, is_model_of, model_facts_of

log = logging.getLogger(__name__)


def open_masks(text: str, config: Config, arch: Architecture | None = None) -> MaskSet:
    """Open masks by name or path, and check that they are whole.

    Args:
        text: the name of a mask of this run (``sparsegpt``, ``learned``), a mask file, a snapshot,
            or a folder of snapshots (the newest).
        config: the settings, which name the run.
        arch: architecture of the model, which a snapshot needs because it names its linears as
            Megatron does. None looks for the architecture in the folders of the run.

    Raises:
        ArtifactError: there are no such masks, or they are torn.
    """
    path = mask_path(text, run_paths(config))
    if path.is_dir():
        return load_snapshot(path, arch or _architecture_of(newest_snapshot(path), config))
    masks = load_masks(path)
    masks.check_whole()
    return _with_weights(masks, config) if masks.lacks_weights else masks


def _with_weights(masks: MaskSet, config: Config) -> MaskSet:
    """The masks with the weights of the configured model, where there is one."""
    base = base_model(config)
    if not base.place.exists():
        return masks
    shapes = {name: masks.shape(name) for name in masks}
    return masks.with_weights(stored_weights(base, masks.path, shapes, masks.fingerprints))


def recovered_names(paths: RunPaths) -> list[str]:
    """The names of the masks of this run that belong to recovered weights, in order. Those that
    were recovered under a mask which the run has made anew since are left out, with a warning: a
    table would show them beside a mask that is not theirs.
    """
    names = []
    for method in get_args(RecoveryName):
        for file in paths.masks.glob(f"*-{method}.safetensors"):
            header = load_masks(file).meta
            if not (about := recovery_of(header)):
                continue
            mask = paths.mask(str(about.get("mask")))
            if why := outdated(header, load_masks(mask) if mask.exists() else None):
                log.warning("%s %s: left out. Run the verb recover again.", file, why)
            else:
                names.append(file.stem)
    return sorted(names)


def mask_path(text: str, paths: RunPaths) -> Path:
    """The file or folder that ``text`` means.

    A mask of this run comes before a path of the same name.

    Raises:
        ArtifactError: the run has no such mask, and there is no such path.
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
    if near:
        hint = f"Did you mean {near[0]}?"
    elif have:
        hint = f"This run has {', '.join(have)}."
    else:
        hint = "This run has no masks yet."
    fix = (
        "Name a mask of this run, a mask file, a snapshot or a folder of snapshots, "
        f"or run the verb that makes it. {hint}"
    )
    raise ArtifactError(named, "is missing", fix)


def new_mask_file(key: str, text: str, usage: str) -> Path:
    """The path of a mask file that is to be written, in a folder that can be written.

    Args:
        key: the argument, for the message.
        text: its value.
        usage: a command line that is right, for the message.

    Raises:
        ConfigError: there is such a file already, or it has another ending than .safetensors.
        ArtifactError: the folder cannot be written.
    """
    out = Path(text)
    if out.suffix != ".safetensors":
        allowed = "a file whose name ends in .safetensors"
        raise ConfigError(key, text, allowed, f"Write {usage}.")
    if out.exists():
        fix = "Delete it, or choose another name."
        raise ConfigError(key, text, "a file that is not there yet", fix)
    require_writable(out.parent, key)
    return out


def _architecture_of(snapshot: Path, config: Config) -> Architecture:
    """The architecture of the model that a snapshot was learned on.

    The places are searched in this order: the run that holds the snapshot, the Hugging Face folder
    that its note names, and the configured run.
    """
    paths = run_paths(config)
    places = [
        *(folder / "weights" for folder in real_path(snapshot).parents[2:3]),
        paths.weights,
        paths.hf,
    ]
    try:
        settings = read_json(snapshot / NOTE, "")["settings"]
        hf = settings["model.hf"] if "model.hf" in settings else settings["model"]["hf"]
        places.insert(1, Path(hf))
    except (ArtifactError, KeyError, TypeError):
        pass  # model.hf may not be set; a torn note is reported when the snapshot is opened
    for folder in places:
        if (folder / "config.json").exists():
            return read_architecture(folder, config.model.ignore_keys)
    problem = "was learned on a model whose config.json is not found"
    raise ArtifactError(snapshot, problem, "Set model.hf to the Hugging Face folder of that model.")


def own_weights(masks: MaskSet, paths: RunPaths) -> Path | None:
    """The folder of Megatron weights that a mask was made with, where these are not the model's.

    A method that updates or recovers the kept weights, such as ``sparsegpt_update``, writes a mask
    and weights that belong together: measured and handed out are both or neither.

    Args:
        masks: masks of the run or of a mask file. A file RUN/masks/METHOD.safetensors belongs to
            the weights in RUN.
        paths: of the configured run, where the weights are looked for if the file lies elsewhere.

    Raises:
        ArtifactError: the weights are missing, or were made with another mask or from another
            model.
    """
    if not masks.has_own_weights:
        return None
    folder = masks.path.parent.parent / f"weights-{masks.method}"
    if masks.path.parent.name != "masks" or not folder.is_dir():
        folder = paths.updated_weights(masks.method)
    fix = way_to_remake(masks)
    if not folder.is_dir():
        problem = f"is missing: the mask {masks.path} belongs to these updated weights"
        raise ArtifactError(folder, problem, fix)
    note = read_object(folder / NOTE, fix, {"fingerprint": str, "method": str})
    if not belong_together(masks, note):
        problem = f"does not belong to the mask {masks.path}: the weights have another recipe"
        raise ArtifactError(folder, problem, fix)
    if not is_model_of(model_facts_of(note), digest_of_run(paths)):
        problem = f"was made from another model than {paths.weights}: {OTHER_PARTS}"
        raise ArtifactError(folder, problem, fix)
    return folder


def digest_of_run(paths: RunPaths) -> dict[str, str]:
    """The digest of the model that a run was converted from, under its key; {} where it is not
    known.

    Raises:
        ArtifactError: the note beside the weights is torn.
    """
    place = paths.weights / NOTE
    known = read_object(place, "Run the verb convert again.", {}) if place.is_file() else {}
    return model_facts_of(known)


def check_named_weights(folder: Path, masks: MaskSet | None) -> None:
    """Check that weights which the user names may stand under masks: weights that a method updated
    or recovered go with the mask of that very result, and a mask with weights of its own goes with
    no others. So nothing is handed out under the name of another result.

    Args:
        folder: Megatron weights; those of a checkpoint have no note.
        masks: the masks; None for the dense model.

    Raises:
        ArtifactError: weights and masks are of two results, or the note is torn.
    """
    place = folder / NOTE
    note = read_object(place, f"Make {folder} again.", {}) if place.is_file() else {}
    method = note.get("method")
    if masks is not None and masks.has_own_weights:
        if not belong_together(masks, note):
            problem = f"does not belong to the mask {masks.path}, which has weights of its own"
            fix = "Leave export.weights null: the weights that belong to a mask are found."
            raise ArtifactError(folder, problem, fix)
    elif method is not None:
        under = "the dense model" if masks is None else f"the mask {masks.path}"
        problem = f"has weights that {method} updated; they do not belong to {under}"
        fix = f"Set export.mask={method} and leave export.weights null."
        raise ArtifactError(folder, problem, fix)
