"""The verb export: a Hugging Face folder and a mask file become a masked folder that plain
transformers loads.

Pruned places hold +0.0 and the config says nothing of sparsity: whatever loads the dense model
loads this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megamask import __version__
from megamask.errors import ArtifactError
from megamask.masks.apply import masked
from megamask.masks.file import MaskSet
from megamask.storage import write_json
from megamask.weights.hf_files import open_checked, write_hf

STAMP = "megamask_export.json"  # in the folder that is written: which mask it holds


def export(
    hf_dir: Path, out: Path, tensors: Iterator[tuple[str, Tensor]], masks: MaskSet | None
) -> None:
    """Stream ``tensors`` (HF names) through ``masks`` into ``out``; side files come from
    ``hf_dir``. Prints sizes.

    Raises:
        ArtifactError: what was written is not what was meant; ``out`` is left as it was.
    """

    def finish(folder: Path) -> None:
        check_export(folder, masks)
        about = (
            None
            if masks is None
            else {key: value for key, value in masks.meta.items() if key != "tensors"}
        )
        write_json(folder / STAMP, {"megamask": __version__, "mask": about})

    write_hf(
        out, tensors if masks is None else _masked_tensors(tensors, masks), hf_dir, finish=finish
    )
    what = "dense" if masks is None else f"{masks.method} {masks.pattern} on {len(masks)} linears"
    what += (
        f", mask file {masks.size:,} bytes" if masks is not None and masks.path.is_file() else ""
    )
    print(f"{out}: {what}; {_size(out):,} bytes written and verified")


def check_export(folder: Path, masks: MaskSet | None) -> None:
    """Check a written folder, reading it back: all tensors are there, and every pruned place of
    every masked linear is +0.0.

    Raises:
        ArtifactError: the first linear that fails.
    """
    with open_checked(folder) as reader:
        if masks is None:
            return
        for name, mask_OI in masks.items():
            weight_OI = reader.tensor(f"{name}.weight")
            kept = (weight_OI != 0).unflatten(1, (-1, masks.pattern.m)).sum(-1)
            pruned = weight_OI[~mask_OI]
            if (
                int(kept.max()) > masks.pattern.n
                or bool(pruned.any())
                or bool(torch.signbit(pruned).any())
            ):
                raise ArtifactError(
                    folder,
                    f"{name} does not hold +0.0 wherever its mask prunes",
                    "Export again; report it if it stays.",
                )


def _masked_tensors(
    tensors: Iterator[tuple[str, Tensor]], masks: MaskSet
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        yield (
            name,
            masked(tensor, masks[module]) if leaf == "weight" and module in masks else tensor,
        )


def _size(path: Path) -> int:
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )
