"""The table of measured times, dense against 2:4, and what it says of a linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.runtime.device_facts import DeviceFacts
from megamask.runtime.sparse_kernels import DTYPES, KERNELS, Shape
from megamask.storage import is_number, read_object

FILE = "speed.json"
FIX = "Run the verb speed again on this machine."
MILLISECONDS = (1e-6, 1e9)  # of a product; no clock measures others
SPEED_UPS = (1e-6, 1e6)
MOST_TOKENS = 2**20  # of a forward pass
Passes = Mapping[int, int]  # tokens in a forward pass -> how many such passes


@dataclass(frozen=True)
class Row:
    """A linear with so many tokens in a forward pass, dense and by a 2:4 kernel.

    Attributes:
        out_features, in_features: shape of the weight.
        dtype: of weight and activations, ``bf16`` or ``fp16``.
        tokens: rows of the activations.
        kernel: the 2:4 kernel.
        dense_ms: median milliseconds of the dense product.
        sparse_ms: of the 2:4 product; None where it was not possible.
        speed_up: first quartile, median and third quartile of dense / 2:4 over the rounds, each of
            which timed both in turn; empty where it was not possible.
        dense_bytes, sparse_bytes: of the weight.
        why: why the 2:4 product was not possible.
    """

    out_features: int
    in_features: int
    dtype: str
    tokens: int
    kernel: str
    dense_ms: float
    sparse_ms: float | None
    speed_up: tuple[float, ...]
    dense_bytes: int
    sparse_bytes: int | None
    why: str = ""

    @property
    def shape(self) -> Shape:
        """(O, I)."""
        return self.out_features, self.in_features

    def verdict(self) -> str:
        """The row in words: a gain or none, and why."""
        if self.sparse_ms is None:
            return f"no gain: {self.why}"
        low, median, high = self.speed_up
        if low > 1:
            return f"gain: {median:.2f} times as fast"
        if high < 1:
            return f"no gain: dense is {1 / median:.2f} times as fast"
        return f"no gain beyond the noise: {low:.2f} to {high:.2f} times as fast"


@dataclass(frozen=True)
class Choice:
    """What the table says of a linear.

    Attributes:
        kernel: the 2:4 kernel to use; None keeps the linear dense.
        why: the reason.
        speed_up: expected at least, over the given passes; 1 where the linear stays dense.
    """

    kernel: str | None
    why: str
    speed_up: float = 1.0


@dataclass(frozen=True)
class SpeedTable:
    """Measured rows of one device.

    Attributes:
        facts: the device and its software.
        passes: the workload that the table was measured for.
        rows: the rows.
    """

    facts: DeviceFacts
    passes: Passes
    rows: Sequence[Row] = field(default_factory=list)

    def choose(self, shape: Shape, dtype: str, passes: Passes) -> Choice:
        """The kernel that is faster than dense over all passes together.

        A kernel counts with the first quartile of its speed-ups, so that noise decides for dense.
        """
        found = {
            (row.kernel, row.tokens): row
            for row in self.rows
            if row.shape == shape and row.dtype == dtype
        }
        name = f"{shape[0]} x {shape[1]} {dtype}"
        missing = sorted(set(passes) - {tokens for _, tokens in found})
        if missing:
            told = ", ".join(map(str, missing))
            return Choice(None, f"not measured: {name} with {told} tokens")
        sure, best, whys = {}, {}, []
        for kernel in dict.fromkeys(kernel for kernel, _ in found):
            rows = [found.get((kernel, tokens)) for tokens in passes]
            if any(row is None or row.sparse_ms is None for row in rows):
                whys += [row.why for row in rows if row is not None and row.why]
                continue
            sure[kernel] = _speed_up([row for row in rows if row], passes, 0)
            best[kernel] = _speed_up([row for row in rows if row], passes, 1)
        if not sure:
            return Choice(None, f"not possible: {whys[0] if whys else 'no kernel was measured'}")
        kernel = max(sure, key=lambda one: sure[one])
        if sure[kernel] > 1:
            why = f"{kernel} is {best[kernel]:.2f} times as fast (at least {sure[kernel]:.2f})"
            return Choice(kernel, why, sure[kernel])
        if best[kernel] > 1:
            why = f"no gain beyond the noise: {sure[kernel]:.2f} to {best[kernel]:.2f} times"
            return Choice(None, f"{why} as fast ({kernel})")
        return Choice(None, f"no gain: dense is {1 / best[kernel]:.2f} times as fast ({kernel})")

    def require(self, facts: DeviceFacts, path: Path | str) -> None:
        """Check that the table is of this device and software.

        Raises:
            ArtifactError: it is of another.
        """
        if facts != self.facts:
            raise ArtifactError(path, f"was measured on {self.facts}, and this is {facts}", FIX)

    def as_json(self) -> dict[str, Any]:
        """The table as its file holds it."""
        return {
            **self.facts.as_json(),
            "passes": {str(tokens): count for tokens, count in self.passes.items()},
            "rows": [asdict(row) for row in self.rows],
        }


def _speed_up(rows: Sequence[Row], passes: Passes, quartile: int) -> float:
    """Dense over 2:4 time of all passes together."""
    dense = sum(passes[row.tokens] * row.dense_ms for row in rows)
    sparse = sum(passes[row.tokens] * row.dense_ms / row.speed_up[quartile] for row in rows)
    return dense / sparse


def read_table(path: Path) -> SpeedTable:
    """The table of a file that the verb speed wrote.

    Raises:
        ArtifactError: the file is missing, or holds something else.
    """
    texts = {one.name: str for one in fields(DeviceFacts)}
    found = read_object(path, FIX, {**texts, "passes": dict, "rows": list})
    rows = [_row(path, number, row) for number, row in enumerate(found["rows"])]
    passes = {}
    for tokens, count in found["passes"].items():
        if not (tokens.isdecimal() and len(tokens) < 10 and int(tokens)) or not _is_count(count):
            raise ArtifactError(path, "holds no numbers of tokens and passes at passes", FIX)
        passes[int(tokens)] = count
    if not passes:
        raise ArtifactError(path, "holds no passes", FIX)
    return SpeedTable(DeviceFacts(**{name: found[name] for name in texts}), passes, rows)


def _row(path: Path, number: int, value: Any) -> Row:
    """A row of the file, checked."""
    problem = ""
    names = {one.name for one in fields(Row)}
    if not isinstance(value, dict) or set(value) != names:
        problem = "is no row"
    elif value["dtype"] not in tuple(DTYPES) or value["kernel"] not in tuple(KERNELS):
        problem = "names another dtype or kernel than there is"
    elif not all(
        _is_count(value[name]) for name in ("out_features", "in_features", "tokens", "dense_bytes")
    ):
        problem = "has a shape or size that is no number"
    elif not _is_between(value["dense_ms"], *MILLISECONDS) or not isinstance(value["why"], str):
        problem = "has no dense time"
    elif value["sparse_ms"] is None:
        if value["speed_up"] != [] or value["sparse_bytes"] is not None or not value["why"]:
            problem = "has no 2:4 time, and does not say why"
    elif not _is_timed(value):
        problem = "has no 2:4 time"
    if problem:
        raise ArtifactError(path, f"rows[{number}] {problem}", FIX)
    return Row(**{**value, "speed_up": tuple(value["speed_up"])})


def _is_timed(value: Mapping[str, Any]) -> bool:
    quartiles = value["speed_up"]
    return (
        _is_between(value["sparse_ms"], *MILLISECONDS)
        and _is_count(value["sparse_bytes"])
        and isinstance(quartiles, list)
        and len(quartiles) == 3
        and all(_is_between(one, *SPEED_UPS) for one in quartiles)
        and sorted(quartiles) == quartiles
    )


def _is_between(value: Any, low: float, high: float) -> bool:
    return is_number(value) and low <= value <= high


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53
