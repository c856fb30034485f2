"""How the weight files of a family hold the tensors of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from megamask.weights.families.registry import FAMILIES
from megamask.weights.family import Architecture, Names
from megamask.weights.file_stream import Streamed
from megamask.weights.mapping import linear_shapes

BUFFERS = ("rotary_emb.inv_freq",)  # endings of tensors in old files that follow from the config


@dataclass(frozen=True)
class FileLayout:
    """What a reader and a writer of files need to know of a family.

    Attributes:
        transposed: names of weights that lie as (in_features, out_features) in the files.
        buffers: endings of tensors that follow from the config.
        embedding, head: names of these weights; a tied head may lie in the files too.
        others: beginnings of the names of tensors beside the text part; see ``Composite``.
        spellings: other spellings that files may have: beginning of names of ours -> beginning in
            the files.
        spelling: that of the files; empty where their names are ours.
    """

    transposed: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = BUFFERS
    embedding: str = f"{Names().embedding}.weight"
    head: str = f"{Names().head}.weight"
    others: tuple[str, ...] = ()
    spellings: tuple[Mapping[str, str], ...] = ()
    spelling: Mapping[str, str] = field(default_factory=dict)

    def of_files(self, names: Collection[str]) -> FileLayout:
        """The layout with the spelling of files that hold tensors of these names."""
        for spelling in self.spellings:
            is_ours = any(name.startswith(tuple(spelling)) for name in names)
            if not is_ours and any(name.startswith(tuple(spelling.values())) for name in names):
                return replace(self, spelling=spelling)
        return replace(self, spelling={})

    def ours(self, name: str) -> str:
        """Our name of a tensor of the files."""
        return _renamed(name, {there: here for here, there in self.spelling.items()})

    def in_files(self, name: str) -> str:
        """The name in the files of a tensor of ours."""
        return _renamed(name, self.spelling)

    def is_other(self, name: str) -> bool:
        """Whether a tensor, by our name, lies beside the text part."""
        return name.startswith(self.others)


def file_layout(arch: Architecture) -> FileLayout:
    """The layout of the files of a model."""
    family = FAMILIES[arch.family]
    names, composite = family.names, family.composite
    shortened = ({names.prefix: ""},) if names.prefix else ()
    weights = frozenset(f"{name}.weight" for name in linear_shapes(arch))
    return FileLayout(
        transposed=weights if names.transposed else frozenset(),
        buffers=BUFFERS + names.buffers,
        embedding=f"{names.embedding}.weight",
        head=f"{names.head}.weight",
        others=composite.others if composite else (),
        spellings=composite.spellings if composite else shortened,
    )


def turned(
    tensors: Iterable[tuple[str, Tensor | Streamed]], layout: FileLayout
) -> Iterator[tuple[str, Streamed]]:
    """Tensors as the files hold them, from tensors as the model has them."""
    for name, tensor in tensors:
        numbers = Streamed.of(tensor)
        yield layout.in_files(name), numbers.t() if name in layout.transposed else numbers


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    for before, after in beginnings.items():
        if name.startswith(before):
            return after + name[len(before) :]
    return name
