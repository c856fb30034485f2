"""How the weight files of a family hold the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megamask.weights.families.registry import FAMILIES
from megamask.weights.family import Architecture, Names
from megamask.weights.mapping import linear_shapes

BUFFERS = ("rotary_emb.inv_freq",)  # endings of tensors in old files that follow from the config


@dataclass(frozen=True)
class FileLayout:
    """What a reader and a writer of files need to know of a family.

    Attributes:
        transposed: names of weights that lie as (in_features, out_features) in the files.
        prefix: beginning of the names that some files leave out.
        buffers: endings of tensors that follow from the config.
        embedding, head: names of these weights; a tied head may lie in the files too.
    """

    transposed: frozenset[str] = frozenset()
    prefix: str = ""
    buffers: tuple[str, ...] = BUFFERS
    embedding: str = f"{Names().embedding}.weight"
    head: str = f"{Names().head}.weight"


def file_layout(arch: Architecture) -> FileLayout:
    """The layout of the files of a model."""
    names = FAMILIES[arch.family].names
    weights = frozenset(f"{name}.weight" for name in linear_shapes(arch))
    return FileLayout(
        transposed=weights if names.transposed else frozenset(),
        prefix=names.prefix,
        buffers=BUFFERS + names.buffers,
        embedding=f"{names.embedding}.weight",
        head=f"{names.head}.weight",
    )


def turned(
    tensors: Iterable[tuple[str, Tensor]], layout: FileLayout
) -> Iterator[tuple[str, Tensor]]:
    """Tensors as the files hold them, from tensors as the model has them."""
    for name, tensor in tensors:
        yield name, tensor.t() if name in layout.transposed else tensor
