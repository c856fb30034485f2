"""The patterns of a whole model: which linear has which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from megamask.sparsity.pattern import Pattern


class PatternPlan(Mapping[str, Pattern]):
    """HF module name -> pattern, for every linear that gets a mask; all others are dense.

    The text of a plan is its pattern, ``2:4``, or all of its patterns, ``2:4 and 6:8``.
    """

    def __init__(self, patterns: Mapping[str, Pattern]) -> None:
        self._patterns = dict(patterns)

    @classmethod
    def uniform(cls, names: Sequence[str], pattern: Pattern) -> PatternPlan:
        """The plan of one pattern for all of ``names``."""
        return cls(dict.fromkeys(names, pattern))

    def __getitem__(self, name: str) -> Pattern:
        return self._patterns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def __str__(self) -> str:
        *others, last = map(str, self.distinct or ("no pattern",))
        return f"{', '.join(others)} and {last}" if others else last

    @property
    def distinct(self) -> tuple[Pattern, ...]:
        """The patterns, each once, in the order of the model."""
        return tuple(dict.fromkeys(self._patterns.values()))

    @property
    def only(self) -> Pattern | None:
        """The pattern of all linears; None where they have several."""
        distinct = self.distinct
        return distinct[0] if len(distinct) == 1 else None

    def facts(self) -> str | dict[str, str]:
        """The plan as a JSON value: its pattern, or name -> pattern where there are several."""
        if self.only is not None:
            return str(self.only)
        return {name: str(pattern) for name, pattern in self.items()}

    def weights_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[Pattern, int]:
        """Pattern -> weights, pruned and kept, of its linears.

        Args:
            shapes: (O, I) of every linear of the plan.
        """
        sizes = dict.fromkeys(self.distinct, 0)
        for name, pattern in self.items():
            sizes[pattern] += math.prod(shapes[name])
        return sizes

    def density_of(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """The share of weights kept over the linears of ``shapes``, of which those without a
        pattern are dense.

        Args:
            shapes: (O, I) of every linear that counts.
        """
        weights = sum(math.prod(shape) for shape in shapes.values())
        sizes = self.weights_of(shapes)
        masked = sum(sizes.values())
        kept = sum(size * pattern.n // pattern.m for pattern, size in sizes.items())
        return (weights - masked + kept) / weights  # whole groups
