"""The layout of a GGUF file, checked before a library reads it.

The readers of GGUF files take the lengths in a file as they are, so that a torn or hostile file
makes them wait or allocate without end. Here every length must lie within the file, every tensor
must lie in its data, and no size of the model that the header names may exceed its tensors.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.file_kinds import GGUF, require_file
from megamask.machine_errors import reading

GGUF_STAMP = "megamask_gguf.json"  # this file in an unpacked folder names the GGUF file

FIX = "Copy or download the file again."
MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = dict(
    enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d"))
)
TEXT, LIST = 8, 9
MAX_DIMENSIONS = 4
MAX_DEPTH = 2  # of lists within lists
MAX_ALIGNMENT = 2**16


@dataclass(frozen=True)
class ListOf:
    """A list in the header, of which the length alone is kept."""

    count: int


@dataclass(frozen=True)
class Layout:
    """What the header of a GGUF file says.

    Attributes:
        facts: key -> number or text; a list as ``ListOf``.
        shapes: tensor -> dimensions, the fastest first.
    """

    facts: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read_layout(path: Path, known: Collection[str]) -> Layout:
    """Read the header of a GGUF file and check it against the file.

    Args:
        path: the file.
        known: architectures whose sizes are checked. Others may have lists of them, and are refused
            by their name later.

    Raises:
        ArtifactError: a length, an offset, a type or a size of the model that does not fit, or the
            file is one of several parts.
    """
    require_file(path, GGUF, FIX)
    with (
        reading(path, FIX),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            layout = _Reader(data).layout()
            _refuse_part(path, layout)
            if layout.facts.get("general.architecture") in known:
                _check_sizes(layout)
        except (ValueError, struct.error) as error:
            raise ArtifactError(path, f"is a torn GGUF file ({error})", FIX) from None
    return layout


class _Reader:
    """A place in the header, which moves on with every value."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._place = data, 0

    def layout(self) -> Layout:
        """All facts and tensors.

        Raises:
            ValueError: anything that does not lie within the file.
        """
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, versions 2 and 3 are read")
        tensors, facts = self._number("<Q"), self._number("<Q")
        self._check_count(tensors, 24)
        self._check_count(facts, 13)
        found: dict[str, Any] = {}
        for _ in range(facts):
            key = self._text()
            if key in found:
                raise ValueError(f"{key} stands there twice")
            found[key] = self._value(self._number("<I"), 0)
        infos = [self._tensor() for _ in range(tensors)]
        shapes = {name: shape for name, shape, _, _ in infos}
        if len(shapes) != len(infos):
            raise ValueError("a tensor stands there twice")
        self._check_data(found, infos)
        return Layout(found, shapes)

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._place:
            raise ValueError(f"{count:,} bytes after {self._place:,}, the file ends before")
        self._place += count
        return self._data[self._place - count : self._place]

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def _check_count(self, count: int, least: int) -> None:
        """Check that so many values, of at least so many bytes each, can follow."""
        if count * least > len(self._data) - self._place:
            raise ValueError(f"{count:,} values after {self._place:,}, the file ends before")

    def _text(self) -> str:
        raw = self._take(self._number("<Q"))
        return raw.decode("utf-8")  # UnicodeDecodeError is a ValueError

    def _value(self, kind: int, depth: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == LIST:
            return self._list(depth)
        form = NUMBERS.get(kind)
        if not form:
            raise ValueError(f"a value of type {kind}")
        return self._number(form)

    def _list(self, depth: int) -> ListOf:
        kind, count = self._number("<I"), self._number("<Q")
        form = NUMBERS.get(kind)
        if form:
            self._check_count(count, struct.calcsize(form))
            self._take(count * struct.calcsize(form))
            return ListOf(count)
        if kind not in (TEXT, LIST) or depth >= MAX_DEPTH:
            raise ValueError(f"a list of type {kind} at depth {depth}")
        self._check_count(count, 8 if kind == TEXT else 12)
        for _ in range(count):
            self._value(kind, depth + 1)
        return ListOf(count)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._text(), self._number("<I")
        if not 0 < rank <= MAX_DIMENSIONS:
            raise ValueError(f"{name} has {rank} dimensions")
        shape = tuple(self._number("<Q") for _ in range(rank))
        return name, shape, self._number("<I"), self._number("<Q")

    def _check_data(
        self, facts: dict[str, Any], infos: list[tuple[str, tuple[int, ...], int, int]]
    ) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        step = facts.get("general.alignment", 32)
        if type(step) is not int or not 0 < step <= MAX_ALIGNMENT or step & (step - 1):
            raise ValueError(f"general.alignment is {step!r}")
        room = len(self._data) - (self._place + -self._place % step)
        for name, shape, kind, offset in infos:
            if kind not in {one.value for one in GGMLQuantizationType}:
                raise ValueError(f"{name} has the type {kind}")
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            count = 1
            for size in shape:
                count *= size
            if not count or shape[0] % block or offset % step:
                raise ValueError(f"{name} has {shape} values of type {kind} at {offset:,}")
            if offset + count // block * width > room:
                raise ValueError(f"{name} ends outside the file")


def _refuse_part(path: Path, layout: Layout) -> None:
    """Refuse a part of a model, which has some of the tensors, and the sizes of all or of none.

    Raises:
        ArtifactError: the file is a part.
    """
    number, count = (layout.facts.get(f"split.{key}", 0) for key in ("no", "count"))
    if type(count) is int and count > 1:
        which = f"part {number + 1}" if type(number) is int else "one"
        fix = (
            "Merge the parts with llama.cpp: llama-gguf-split --merge FIRST.gguf WHOLE.gguf, and "
            "set model.gguf=WHOLE.gguf."
        )
        raise ArtifactError(path, f"is {which} of the {count:,} parts of a GGUF file", fix)


def _check_sizes(layout: Layout) -> None:
    """Check that the sizes which a model is built from do not exceed the tensors that fill it.

    Raises:
        ValueError: a size beyond the tensors, or no embedding.
    """
    family = layout.facts.get("general.architecture")
    embedding = layout.shapes.get("token_embd.weight", ())
    if not isinstance(family, str) or len(embedding) != 2:
        raise ValueError("it names no architecture, or has no embedding")
    hidden, vocab = embedding
    layers = len({name.split(".")[1] for name in layout.shapes if name.startswith("blk.")})
    down = layout.shapes.get("blk.0.ffn_down.weight")
    limits = {
        f"{family}.embedding_length": hidden,
        f"{family}.block_count": layers,
        f"{family}.feed_forward_length": down[0] if down else 2**31 - 1,
        f"{family}.vocab_size": vocab,
        f"{family}.attention.head_count": hidden,
        f"{family}.attention.head_count_kv": hidden,
        f"{family}.attention.key_length": 2**16,
        f"{family}.attention.value_length": 2**16,
        f"{family}.rope.dimension_count": 2**16,
        f"{family}.context_length": 2**31 - 1,
    }
    for key, limit in limits.items():
        named = layout.facts.get(key, 1)
        if type(named) is not int or not 0 < named <= limit:
            raise ValueError(f"{key} is {named!r}, the tensors allow at most {limit:,}")
    words = layout.facts.get("tokenizer.ggml.tokens")
    if words is not None and not (isinstance(words, ListOf) and words.count <= vocab):
        raise ValueError(f"the tokenizer has {words!r}, the embedding {vocab:,} rows")
