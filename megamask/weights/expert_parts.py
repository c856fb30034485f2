"""The linears of experts that a transformers model holds together.

Since version 5, transformers keeps the experts of a layer in memory as two parameters of three
dimensions, and writes each expert's linears apart into the files. The masks name the linears of the
files. A part stands for one of these linears: its weight is a view of the parameter.

Shapes: E experts, F their width, H hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from megamask.weights.wrapped_names import unwrapped


class Spelling(NamedTuple):
    """The names of a class in the files.

    Attributes:
        place, in_files: end of the module's name in memory, and what it is in the files.
        gate, up, down: names of an expert's linears in the files.
    """

    place: str
    in_files: str
    gate: str
    up: str
    down: str


QWEN = Spelling("", "", "gate_proj", "up_proj", "down_proj")
# Class of transformers with gate_up_proj (E, 2 F, H) and down_proj (E, H, F) -> its names.
FUSED = {
    "MixtralExperts": Spelling("mlp.experts", "block_sparse_moe.experts", "w1", "w3", "w2"),
    "Qwen2MoeExperts": QWEN,
    "Qwen3MoeExperts": QWEN,
}
ROUTERS = ("gate", "shared_expert_gate")  # names of linears of these layers that are never pruned


class ExpertPart(nn.Module):
    """A linear of one expert.

    Args:
        owner: the module that holds the experts.
        parameter: its parameter.
        expert: number of the expert.
        half: 0 for gate, 1 for up, None for the whole.
    """

    def __init__(self, owner: nn.Module, parameter: str, expert: int, half: int | None) -> None:
        super().__init__()
        self._owner = weakref.ref(owner)
        self._parameter, self._expert, self._half = parameter, expert, half

    @property
    def owner(self) -> nn.Module:
        """The module that holds the experts."""
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def weight(self) -> Tensor:
        """(O, I), a view: what is written to it is written to the parameter."""
        whole: Tensor = getattr(self.owner, self._parameter)[self._expert]
        return whole if self._half is None else whole.chunk(2)[self._half]


_PARTS: WeakKeyDictionary[nn.Module, dict[str, ExpertPart]] = WeakKeyDictionary()


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module, as ``named_modules``, with the parts of experts that are held together by
    their names in the files. The parts of a module are the same objects at every call.
    """
    for name, module in model.named_modules():
        yield name, module
        spelling = FUSED.get(type(module).__name__)
        if spelling is None or not _is_fused(module):
            continue
        stem = name
        plain = unwrapped(name)  # a wrapper may stand within the place
        if spelling.place and plain.endswith(spelling.place):
            stem = plain.removesuffix(spelling.place) + spelling.in_files
        if module not in _PARTS:
            _PARTS[module] = _parts(module, spelling)
        yield from ((f"{stem}.{leaf}", part) for leaf, part in _PARTS[module].items())


def is_router(name: str) -> bool:
    """Whether a linear of this name chooses or weighs experts."""
    return name.rpartition(".")[2] in ROUTERS


def _is_fused(module: nn.Module) -> bool:
    up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(one, Tensor) and one.dim() == 3 for one in (up, down))


def _parts(module: nn.Module, spelling: Spelling) -> dict[str, ExpertPart]:
    places = (
        (spelling.gate, "gate_up_proj", 0),
        (spelling.up, "gate_up_proj", 1),
        (spelling.down, "down_proj", None),
    )
    count = len(cast(Tensor, module.down_proj))
    return {
        f"{expert}.{leaf}": ExpertPart(module, parameter, expert, half)
        for expert in range(count)
        for leaf, parameter, half in places
    }
