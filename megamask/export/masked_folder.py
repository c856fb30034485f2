"""A masked Hugging Face folder that plain transformers loads.

Pruned places hold +0.0, and the config says nothing about sparsity. So every program that loads the
dense model loads the masked model too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megamask import __version__
from megamask.errors import ArtifactError
from megamask.masks.apply import masked
from megamask.masks.file import MaskSet
from megamask.storage import write_json
from megamask.terminal import tell
from megamask.weights.architecture import read_architecture
from megamask.weights.file_layout import file_layout
from megamask.weights.hf_files import open_checked, write_hf
from megamask.weights.own_folder import own_files

STAMP = "megamask_export.json"  # this file in the written folder describes its masks


def export(
    hf_dir: Path,
    out: Path,
    tensors: Iterator[tuple[str, Tensor]],
    masks: MaskSet | None,
    ignore_keys: Collection[str] = (),
) -> None:
    """Write a masked folder, check it and print its size.

    Args:
        hf_dir: Hugging Face folder of the model, which the side files are copied from.
        out: the folder to write.
        tensors: pairs of HF name and dense tensor.
        masks: the masks; None writes the dense tensors.
        ignore_keys: see ``read_architecture``.

    Raises:
        ArtifactError: the written folder fails its check; ``out`` does not change.
    """

    def finish(folder: Path) -> None:
        check_export(folder, masks, ignore_keys)
        header = None
        if masks is not None:
            header = {key: value for key, value in masks.meta.items() if key != "tensors"}
        write_json(folder / STAMP, {"megamask": __version__, "mask": header, **own_files(folder)})

    content = "dense"
    if masks is not None:
        tensors = _masked_tensors(tensors, masks)
        content = f"{masks.method} {masks.pattern} on {len(masks)} linears"
        if masks.path.is_file():
            content += f", mask file {masks.size:,} bytes"
    layout = file_layout(read_architecture(hf_dir, ignore_keys))
    write_hf(out, tensors, hf_dir, finish=finish, layout=layout)
    tell(f"{out}: {content}; {_size(out):,} bytes written and verified")


def check_export(folder: Path, masks: MaskSet | None, ignore_keys: Collection[str] = ()) -> None:
    """Read a written folder back and check it.

    All tensors must be there, and every pruned place of every masked linear must hold +0.0.

    Raises:
        ArtifactError: the first linear that fails.
    """
    with open_checked(folder, ignore_keys) as reader:
        if masks is None:
            return
        for name, mask_OI in masks.items():
            weight_OI = reader.tensor(f"{name}.weight")
            groups_OGM = weight_OI.view(len(weight_OI), -1, masks.pattern.m)
            kept_OG = (groups_OGM != 0).sum(-1)
            pruned = weight_OI[~mask_OI]
            not_zero = bool(pruned.any()) or bool(torch.signbit(pruned).any())
            if int(kept_OG.max()) > masks.pattern.n or not_zero:
                problem = f"{name} does not hold +0.0 wherever its mask prunes"
                raise ArtifactError(folder, problem, "Export again; report it if it stays.")


def _masked_tensors(
    tensors: Iterator[tuple[str, Tensor]], masks: MaskSet
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            fix = "Repair the model: megamask convert names each such tensor."
            raise ArtifactError(masks.path, f"{name} of the model is not finite", fix)
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in masks:
            yield name, tensor
            continue
        mask_OI = masks[module]
        if masks.has_own_weights and bool(tensor[~mask_OI].any()):
            problem = f"{module} keeps weights that the mask prunes: they do not belong together"
            raise ArtifactError(masks.path, problem, f"Run prune again for {masks.method}.")
        yield name, masked(tensor, mask_OI)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
