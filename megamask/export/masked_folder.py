"""A masked Hugging Face folder that plain transformers loads.

Pruned places hold +0.0, and the config says nothing about sparsity. So every program that loads the
dense model loads the masked model too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from megamask.errors import ArtifactError
from megamask.export.folded import (
    FoldedSource,
    check_zeros,
    say_nothing_of_sparsity,
    tell_written,
    write_stamp,
)
from megamask.masks.file import MaskSet
from megamask.weights.base_model import BaseModel
from megamask.weights.hf_files import open_checked, write_hf
from megamask.weights.other_tensors import bytes_of
from megamask.weights.source import WeightSource


def export(base: BaseModel, out: Path, source: WeightSource, masks: MaskSet | None) -> None:
    """Write a masked folder, check it and print its size.

    Args:
        base: the model, whose folder the side files are copied from.
        out: the folder to write.
        source: the dense tensors.
        masks: the masks; None writes the dense tensors.

    Raises:
        ArtifactError: the written folder fails its check; ``out`` does not change.
    """

    def finish(folder: Path) -> None:
        write_stamp(
            folder, masks, BaseModel(folder, ignore_keys=base.ignore_keys).fingerprints().exact
        )

    write_masked(base, out, source, masks, finish)
    tell_written(out, masks)


def write_masked(
    base: BaseModel,
    out: Path,
    source: WeightSource,
    masks: MaskSet | None,
    finish: Callable[[Path], None],
) -> None:
    """Write a masked folder and check it: every verb that hands out the model writes it here.

    Args:
        base: the model, whose folder the side files are copied from.
        out: the folder to write.
        source: the dense tensors.
        masks: the masks; None writes the dense tensors.
        finish: adds files to the checked folder, before it is renamed to ``out``.

    Raises:
        ArtifactError: the written folder fails its check; ``out`` does not change.
    """

    def check(folder: Path) -> None:
        check_export(folder, masks, base.ignore_keys)
        check_others(folder, base, source)
        say_nothing_of_sparsity(folder)
        base.complete(folder, out.name)
        finish(folder)

    tensors = FoldedSource(source, masks).tensors()
    layout = base.layout()
    write_hf(out, tensors, base.hf_dir, finish=check, layout=layout, config=base.config)


def check_export(folder: Path, masks: MaskSet | None, ignore_keys: Collection[str] = ()) -> None:
    """Read a written folder back and check it.

    All tensors must be there, and every pruned place of every masked linear must hold +0.0.

    Raises:
        ArtifactError: the first linear that fails.
    """
    with open_checked(folder, ignore_keys) as reader:
        check_zeros(reader, masks)


def check_others(folder: Path, base: BaseModel, source: WeightSource) -> None:
    """Read a written folder back and check that the tensors beside its text part are those of the
    model, bit for bit.

    Raises:
        ArtifactError: the first tensor that is missing or differs.
    """
    layout = base.layout()
    with open_checked(folder, base.ignore_keys) as reader:
        for name in filter(layout.is_other, source.names()):
            written, given = reader.tensor(name), source.tensor(name)
            alike = written.dtype == given.dtype and written.shape == given.shape
            if not alike or not torch.equal(bytes_of(written), bytes_of(given)):
                problem = f"does not hold {name} as the model has it"
                raise ArtifactError(folder, problem, "Export again; report it if it stays.")
