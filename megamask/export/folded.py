"""Masks folded into weights: pruned places hold +0.0. And what every format of an export shares."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megamask import __version__
from megamask.errors import ArtifactError
from megamask.masks.apply import masked
from megamask.masks.file import MaskSet
from megamask.storage import write_json
from megamask.terminal import tell
from megamask.weights.own_folder import own_files
from megamask.weights.source import WeightSource

STAMP = "megamask_export.json"  # this file in the written folder describes its masks


def fold(name: str, tensor: Tensor, masks: MaskSet | None) -> Tensor:
    """A tensor of the model as the export holds it.

    Args:
        name: its Hugging Face name.
        tensor: its dense numbers.
        masks: the masks; None leaves every tensor dense.

    Raises:
        ArtifactError: the tensor is not finite, or keeps weights that a mask with weights of its
            own prunes.
    """
    if masks is None:
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        fix = "Repair the model: megamask convert names each such tensor."
        raise ArtifactError(masks.path, f"{name} of the model is not finite", fix)
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or module not in masks:
        return tensor
    mask_OI = masks[module]
    if masks.has_own_weights and bool(tensor[~mask_OI].any()):
        problem = f"{module} keeps weights that the mask prunes: they do not belong together"
        raise ArtifactError(masks.path, problem, f"Run prune again for {masks.method}.")
    return masked(tensor, mask_OI)


def check_zeros(source: WeightSource, masks: MaskSet | None) -> None:
    """Check that every pruned place of every masked linear of a written model holds +0.0.

    Raises:
        ArtifactError: the first linear that fails.
    """
    if masks is None:
        return
    for name, mask_OI in masks.items():
        weight_OI = source.tensor(f"{name}.weight")
        pruned = weight_OI[~mask_OI]
        not_zero = bool(pruned.any()) or bool(torch.signbit(pruned).any())
        if not_zero or not masks.patterns[name].already_fits(weight_OI):
            problem = f"{name} does not hold +0.0 wherever its mask prunes"
            raise ArtifactError(source.folder, problem, "Export again; report it if it stays.")


def write_stamp(folder: Path, masks: MaskSet | None) -> None:
    """Write the stamp of a finished folder."""
    header = None
    if masks is not None:
        header = {key: value for key, value in masks.meta.items() if key != "tensors"}
    write_json(folder / STAMP, {"megamask": __version__, "mask": header, **own_files(folder)})


def tell_written(out: Path, masks: MaskSet | None, what: str = "") -> None:
    """Print what a folder holds, and its size."""
    content = "dense"
    if masks is not None:
        content = f"{masks.method} {masks.patterns} on {len(masks)} linears"
        if masks.path.is_file():
            content += f", mask file {masks.size:,} bytes"
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    tell(f"{out}: {content}{what}; {size:,} bytes written and verified")
