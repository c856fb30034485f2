"""The tensors of a Megatron checkpoint under their Hugging Face (HF) names, read block by block."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.weights.dist_checkpoint.megatron_names import (
    Place,
    fused_name,
    is_weight,
    place_of,
    prefixes,
)
from megamask.weights.dist_checkpoint.stored_tensors import StoredTensors
from megamask.weights.family import Architecture
from megamask.weights.mapping import rules
from megamask.weights.rule import Rule, runs
from megamask.weights.source import some_of

# Megatron-LM pads the vocabulary to a multiple of 128 x TP (--make-vocab-size-divisible-by).
PADDING = 128 * 64


class MegatronReader:
    """The tensors of a checkpoint, with the methods of ``HFReader``. The reader is a context
    manager.

    Args:
        folder: the folder with the index of the checkpoint.
        arch: the architecture of its model.
        fix: what the user can do if the checkpoint does not fit.

    Raises:
        ArtifactError: the checkpoint is torn, or its names, shapes or layers are not those of
            ``arch``; the message names the tensors.
    """

    def __init__(self, folder: Path, arch: Architecture, fix: str) -> None:
        self.folder, self._fix = folder, fix
        self._stored = StoredTensors(folder, fix)
        self._rules = rules(arch)
        self._rule_of = {name: rule for rule in self._rules for name in rule.hf}
        self._runs: dict[str, list[tuple[int, int, int]]] = {}
        self._places = self._find(arch)

    @property
    def padding(self) -> int:
        """Number of stored rows beyond the vocabulary of the model, which are not read."""
        shapes = self._stored.shapes()
        return max(
            shapes[key][0] - rule.shape()[0]
            for rule in self._rules
            if rule.kind == "vocab"
            for key in self._places[rule.megatron].keys
        )

    def names(self) -> list[str]:
        """All HF names."""
        return list(self._rule_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an HF tensor."""
        rule = self._rule_of[name]
        return rule.shapes[rule.hf.index(name)]

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """A block of an HF tensor, ``cols`` along the last axis: a ``Read`` for the mapping table.

        Raises:
            ArtifactError: the tensor is torn.
        """
        rule = self._rule_of[name]
        first, last, _ = rows.indices(self.shape(name)[0])
        parts = []
        for start, line, count in self._runs_of(name):
            inner = range(max(first, start), min(last, start + count))
            if inner:
                there = range(line + inner.start - start, line + inner.stop - start)
                parts.append((inner.start - first, self._read(rule, there, cols)))
        if len(parts) == 1:
            return parts[0][1]
        key = self._places[rule.megatron].keys[0]
        shape = [max(last - first, 0), *self.shape(name)[1:]]
        if cols is not None:
            shape[-1] = len(range(*cols.indices(shape[-1])))
        found = torch.empty(shape, dtype=self._stored.dtype(key))
        for at, part in parts:
            found[at : at + len(part)] = part
        return found

    def tensor(self, name: str) -> Tensor:
        """A whole HF tensor."""
        return self.read(name, slice(0, self.shape(name)[0]))

    def __enter__(self) -> MegatronReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stored.__exit__(kind, error, trace)

    def _runs_of(self, name: str) -> list[tuple[int, int, int]]:
        """Rows of an HF tensor that follow one another in the Megatron tensor too: the first row in
        either, and their number.
        """
        if name not in self._runs:
            rule = self._rule_of[name]
            lines = rule.to_hf(torch.arange(1, rule.shape()[0] + 1))
            self._runs |= {
                hf: [(start, line - 1, count) for start, line, count in runs(lines[hf])]
                for hf in rule.hf
            }
        return self._runs[name]

    def _read(self, rule: Rule, rows: range, cols: slice | None) -> Tensor:
        """A block of a Megatron tensor."""
        rest = [range(size) for size in rule.shape()[1:]]
        if cols is not None:
            rest[-1] = range(*cols.indices(rest[-1].stop))
        place, parts, begin = self._places[rule.megatron], [], 0
        layer = [] if place.layer is None else [range(place.layer, place.layer + 1)]
        for key in place.keys:
            count = rule.shape()[0] // len(place.keys)
            inner = range(max(rows.start - begin, 0), min(rows.stop - begin, count))
            if inner:
                part = self._stored.read(key, [*layer, inner, *rest])
                parts.append(part[0] if layer else part)
            begin += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _find(self, arch: Architecture) -> dict[str, Place]:
        """The place of every tensor.

        Raises:
            ArtifactError: the checkpoint holds other tensors than the model has.
        """
        shapes = {key: shape for key, shape in self._stored.shapes().items() if is_weight(key)}
        beginnings = prefixes(shapes)
        if len(beginnings) > 1:
            found = ", ".join(map(repr, beginnings))
            raise ArtifactError(self.folder, f"holds several models, named {found}", self._fix)
        prefix = beginnings[0] if beginnings else ""
        places = {rule.megatron: place_of(rule, prefix, shapes) for rule in self._rules}
        used = {key for place in places.values() if place for key in place.keys}
        problems = {
            "misses": [prefix + fused_name(name) for name, place in places.items() if not place],
            "has unknown": [key for key in shapes if key not in used],
            "has wrongly shaped": [
                problem
                for rule in self._rules
                if (place := places[rule.megatron])
                for problem in self._wrong_shapes(rule, place, shapes, arch)
            ],
        }
        faults = [
            f"{what} tensors: {some_of(list(dict.fromkeys(names)))}"
            for what, names in problems.items()
            if names
        ]
        if faults:
            raise ArtifactError(self.folder, "; ".join(faults), self._fix)
        return {name: place for name, place in places.items() if place}

    def _wrong_shapes(
        self, rule: Rule, place: Place, shapes: dict[str, tuple[int, ...]], arch: Architecture
    ) -> list[str]:
        """What is wrong with the shapes of a tensor. The vocabulary may be padded."""
        rows, *rest = rule.shape()
        rows //= len(place.keys)
        layers = () if place.layer is None else (arch.num_layers,)
        found = []
        for key in place.keys:
            shape = shapes[key]
            expected = (*layers, rows, *rest)
            padded = rule.kind == "vocab" and shape[1:] == expected[1:]
            if padded and rows <= shape[0] < rows + PADDING:
                continue
            if shape != expected:
                found.append(f"{key} {shape}, expected {expected}")
        return found
