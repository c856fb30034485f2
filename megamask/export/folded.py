"""Masks folded into weights: pruned places hold +0.0. And what every format of an export shares."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megamask import __version__
from megamask.errors import ArtifactError
from megamask.masks.apply import masked
from megamask.masks.file import MaskSet
from megamask.masks.identity import identity, way_to_remake
from megamask.storage import read_object, write_json
from megamask.terminal import tell
from megamask.weights.file_stream import Streamed, row_blocks
from megamask.weights.own_folder import own_files
from megamask.weights.source import WeightSource, all_finite, is_positive_zero

STAMP = "megamask_export.json"  # this file in the written folder describes its masks
IDENTITY, WRITTEN = "identity", "fingerprint"  # keys of the stamp


class FoldedSource:
    """The tensors of a model as an export holds them, block by block.

    Args:
        source: the dense tensors.
        masks: the masks; None leaves every tensor dense.
    """

    def __init__(self, source: WeightSource, masks: MaskSet | None) -> None:
        self.folder, self.names = source.folder, source.names
        self._source, self._masks = source, masks
        # A tensor of Megatron takes rows of up to three HF tensors in turn. Indices take a quarter
        # of the memory of masks at 2:4, so a mask is made of them block by block.
        self._index_of = lru_cache(maxsize=3)(self._decoded)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(name)

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """A block of a tensor.

        Raises:
            ArtifactError: the block is not finite, or keeps weights that a mask with weights of its
                own prunes.
        """
        block, masks = self._source.read(name, rows, cols), self._masks
        if masks is None:
            return block
        block = block.contiguous()
        if not all_finite(block):
            fix = "Repair the model: megamask convert names each such tensor."
            raise ArtifactError(masks.path, f"{name} of the model is not finite", fix)
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in masks or not block.numel():
            return block
        mask_OI = masks.patterns[module].mask_of(self._index_of(module)[rows])
        mask_OI = mask_OI if cols is None else mask_OI[:, cols]
        if masks.has_own_weights:
            pruned = masked(block, ~mask_OI)
            if not is_positive_zero(pruned) and bool((pruned != 0).any()):
                what = f"{module} keeps weights that the mask prunes: they do not belong together"
                raise ArtifactError(masks.path, what, way_to_remake(masks))
        return masked(block, mask_OI)

    def tensors(self) -> Iterator[tuple[str, Streamed]]:
        """Name and tensor of every tensor, to be written."""
        return ((name, Streamed.from_source(self, name)) for name in self.names())

    def _decoded(self, module: str) -> Tensor:
        assert self._masks is not None
        return self._masks.narrow_index(module)


def check_zeros(source: WeightSource, masks: MaskSet | None) -> None:
    """Check that every pruned place of every masked linear of a written model holds +0.0. A mask
    keeps n of every m, so the weights then fit its pattern too.

    Raises:
        ArtifactError: the first linear that fails.
    """
    if masks is None:
        return
    for name in masks:
        key, index_OG, pattern = f"{name}.weight", masks.narrow_index(name), masks.patterns[name]
        shape = source.shape(key)
        for rows in row_blocks(shape, source.read(key, slice(0, 0)).dtype):
            weight_OI = source.read(key, rows).contiguous()
            if not is_positive_zero(masked(weight_OI, ~pattern.mask_of(index_OG[rows]))):
                problem = f"{name} does not hold +0.0 wherever its mask prunes"
                fix = "Export again; report it if it stays."
                raise ArtifactError(source.folder, problem, fix)


def say_nothing_of_sparsity(folder: Path) -> None:
    """Drop ``sparsity_config`` of the base, which ``model.ignore_keys`` let pass, from config.json:
    vLLM refuses it (vllm-project/vllm#51188).
    """
    path = folder / "config.json"
    config = read_object(path, "Repair the base model.", {})
    if config.pop("sparsity_config", None) is not None:
        write_json(path, config)


def write_stamp(folder: Path, masks: MaskSet | None, written: str | None = None) -> None:
    """Write the stamp of a finished folder: the header of its masks, and what tells them and their
    weights from all others.

    Args:
        folder: the folder.
        masks: its masks; None for dense weights.
        written: the fingerprint of its weights, zeros included; None where it has none.
    """
    about: dict[str, Any] = {"mask": None}
    if masks is not None:
        header = {key: value for key, value in masks.meta.items() if key != "tensors"}
        about = {"mask": header, IDENTITY: identity(masks)}
    if written is not None:
        about[WRITTEN] = written
    write_json(folder / STAMP, {"megamask": __version__, **about, **own_files(folder)})


class Stamp(NamedTuple):
    """What the stamp of a folder says; None for what it does not say.

    Attributes:
        header: of the masks.
        identity: of the masks and their weights, as ``identity`` gives it.
        written: the fingerprint of the weights that were written, zeros included.
    """

    header: dict[str, Any] | None = None
    identity: dict[str, Any] | None = None
    written: str | None = None


def read_stamp(folder: Path) -> Stamp:
    """The stamp of a folder; of one that no export made, a stamp that says nothing.

    Raises:
        ArtifactError: the stamp cannot be read.
    """
    if not (folder / STAMP).is_file():
        return Stamp()
    found = read_object(folder / STAMP, "Export the folder again.", {})
    header, known, written = (found.get(key) for key in ("mask", IDENTITY, WRITTEN))
    return Stamp(
        header if isinstance(header, dict) else None,
        known if isinstance(known, dict) else None,
        written if isinstance(written, str) else None,
    )


def tell_written(out: Path, masks: MaskSet | None, what: str = "") -> None:
    """Print what a folder holds, and its size."""
    content = "dense"
    if masks is not None:
        content = f"{masks.method} {masks.patterns} on {len(masks)} linears"
        if masks.path.is_file():
            content += f", mask file {masks.size:,} bytes"
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    tell(f"{out}: {content}{what}; {size:,} bytes written and verified")
