"""Masks alone, as the NumPy archive of another tool: MaskLLM's ``mask_compressed.npz`` or PATCH's
``mask.npz``. ``megamask.masks.foreign`` describes and reads both.

The folder also holds the licence files of the base model, whose terms hold for its masks too, and
no weight.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy

from megamask import __version__
from megamask.errors import ArtifactError
from megamask.export.folded import tell_written, write_stamp
from megamask.masks.file import MaskSet
from megamask.masks.foreign import maskllm_npz, patch_npz
from megamask.masks.foreign.kind import Base, Kind
from megamask.masks.foreign.packed_npz import NPY
from megamask.storage import atomic_dir
from megamask.weights.base_model import BaseModel
from megamask.weights.source import WeightSource

Arrays = Iterator[tuple[str, npt.NDArray[Any]]]


def export_maskllm(base: BaseModel, out: Path, source: WeightSource, masks: MaskSet | None) -> None:
    """Write ``mask_compressed.npz``, read it back and print its size.

    Args:
        base: the base model of the masks.
        out: the folder to write.
        source: the tensors of the base model.
        masks: the masks.

    Raises:
        ArtifactError: the masks belong to updated weights, or the written file fails its check;
            ``out`` does not change.
    """

    def arrays(masks: MaskSet, known: Base) -> Arrays:
        for name in masks:
            yield f"{name}{maskllm_npz.ENDING}", _packed(masks, name, known)

    _export(base, out, source, masks, "mask_compressed.npz", maskllm_npz.KIND, arrays)


def export_patch(base: BaseModel, out: Path, source: WeightSource, masks: MaskSet | None) -> None:
    """Write ``mask.npz``. The arguments and errors are those of ``export_maskllm``."""

    def arrays(masks: MaskSet, known: Base) -> Arrays:
        yield patch_npz.META, np.array(json.dumps(_meta(masks, base)))
        for name in masks:
            key = f"{name}{patch_npz.WEIGHT}"
            yield key, _packed(masks, name, known)
            shape = np.array(known.shape_in_files(name), dtype=np.int64)
            yield f"{key}{patch_npz.SHAPE}", shape

    _export(base, out, source, masks, "mask.npz", patch_npz.KIND, arrays)


def _export(
    base: BaseModel,
    out: Path,
    source: WeightSource,
    masks: MaskSet | None,
    file: str,
    kind: Kind,
    arrays: Callable[[MaskSet, Base], Arrays],
) -> None:
    assert masks is not None  # the verb refuses an export of no mask
    if masks.has_own_weights:
        problem = "belongs to weights that were updated with it, which a mask archive does not hold"
        raise ArtifactError(masks.path, problem, "Set export.format=hf or megatron.")
    if masks.patterns.only is None:
        problem = f"holds masks of several patterns, {masks.patterns}; {kind.what} is of one"
        raise ArtifactError(masks.path, problem, "Set export.format=hf or megatron.")
    known = Base(base.architecture(), source, masks.patterns)
    with atomic_dir(out) as folder:
        _write(folder / file, arrays(masks, known))
        _check(folder / file, kind, masks, known)
        base.copy_licences(folder)
        write_stamp(folder, masks)
    tell_written(out, masks, f" as {kind.what}")


def _write(path: Path, arrays: Arrays) -> None:
    """Write an archive as ``numpy.savez_compressed`` does, an array at a time in memory. Equal
    arrays give equal bytes: the entries have no time.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays:
            with archive.open(f"{name}{NPY}", "w", force_zip64=True) as stream:
                npy.write_array(stream, array, version=(1, 0), allow_pickle=False)


def _check(path: Path, kind: Kind, masks: MaskSet, known: Base) -> None:
    """Read a written archive and compare every mask.

    Raises:
        ArtifactError: a mask is missing or another.
    """
    left = set(masks)
    for name, mask_OI in kind.read(path, known):
        if name not in left or not torch.equal(mask_OI, masks[name]):
            left.add(name)
            break
        left.remove(name)
    if left:
        problem = f"does not hold the mask of {sorted(left)[0]}"
        raise ArtifactError(path, problem, "Export again; report it if it stays.")


def _packed(masks: MaskSet, name: str, known: Base) -> npt.NDArray[np.uint8]:
    """The bits of a mask as the files of the model hold the weight, the first in the highest
    place.
    """
    return np.packbits(known.turned(name, masks[name]).numpy())


def _meta(masks: MaskSet, base: BaseModel) -> dict[str, Any]:
    """What ``__meta__`` says."""
    return {
        "base_model": base.home.name,
        "method": masks.method,
        "pattern": str(masks.pattern),
        "sparsity": f"{1 - masks.pattern.density:.4g}",
        "format": "bit-packed uint8 (np.packbits); unpack with np.unpackbits",
        "fingerprint": masks.fingerprint,
        "written_by": f"megamask {__version__}",
    }
