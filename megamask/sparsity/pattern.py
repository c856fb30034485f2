"""N:M patterns: keep exactly n of every m consecutive inputs. No other file knows the order of
candidates, nor what a unit is.

A pattern of pairs, 4:8:pair, keeps or removes adjacent weights together: two of the four pairs of a
group. A pair is a unit of 2 weights, and a weight of any other pattern is a unit of its own. A
candidate, a bit of a hard code and a mask logit belong to a unit; ``n``, ``m`` and every mask count
weights. Sparse tensor cores of NVIDIA Blackwell take 4:8:pair for weights in NVFP4, where two
weights share a byte.

Shapes: O out_features, I in_features, G groups per row (I / m), C candidates, M group size, U units
of a row (I / unit).
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt
import torch

from megamask.errors import ConfigError
from megamask.sparsity.by_position import best_of_groups
from megamask.sparsity.look_up import MaskTable, Numbers, look_up, smallest_dtype

MAX_CANDIDATES = 256  # of a table
TABLE_BITS = 16  # groups up to this size look their index up in one table
MAX_GROUP = 64  # so that the index of a candidate fits in 64 bits
CANDIDATE_ORDER = "itertools.combinations-v1"
UNITS = {1: "", 2: ":pair"}  # weights of a unit -> what follows N:M in the text of a pattern


@dataclass(frozen=True)
class Pattern:
    """Keep ``n`` of every ``m`` consecutive inputs, in units of ``unit`` adjacent inputs.

    Attributes:
        n: number of weights kept, a multiple of ``unit``.
        m: number of weights of a group, a multiple of ``unit``.
        unit: 1, or 2 for pairs, which start at even inputs.
    """

    n: int
    m: int
    unit: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= MAX_GROUP:
            raise ConfigError(
                "pattern",
                str(self),
                f"N:M with 0 < N < M <= {MAX_GROUP}",
                "Write, for example, pattern=2:4.",
            )
        if self.unit not in UNITS or self.n % self.unit or self.m % self.unit:
            allowed = "N:M of single weights, or N:M:pair with even N and M"
            raise ConfigError("pattern", str(self), allowed, "Write, for example, 4:8:pair.")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``"2:4"`` or ``"4:8:pair"``.

        Raises:
            ConfigError: not N:M or N:M:pair with 0 < N < M <= MAX_GROUP.
        """
        match = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*(?::\s*(pair)\s*)?", str(text))
        if not match:
            raise ConfigError(
                "pattern",
                text,
                "N:M, the number kept and the group size, or N:M:pair",
                "Write, for example, pattern=2:4.",
            )
        return cls(int(match[1]), int(match[2]), 2 if match[3] else 1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{UNITS.get(self.unit, f':{self.unit}')}"

    @property
    def in_words(self) -> str:
        """What follows "keep": ``2 of every 4 weights``."""
        noun = "weights" if self.unit == 1 else "adjacent pairs"
        return f"{self.units.n} of every {self.units.m} {noun}"

    # units

    @cached_property
    def units(self) -> Pattern:
        """The pattern of the units, N:M of single units: 2:4 for 4:8:pair."""
        return self if self.unit == 1 else Pattern(self.n // self.unit, self.m // self.unit)

    def expand(self, of_units: torch.Tensor) -> torch.Tensor:
        """(..., I): every weight gets the value of its unit, (..., U)."""
        return of_units if self.unit == 1 else of_units.repeat_interleave(self.unit, -1)

    def sum_of_units(self, of_weights: torch.Tensor) -> torch.Tensor:
        """(..., U): the sum over the weights of every unit, of numbers (..., I)."""
        if self.unit == 1:
            return of_weights
        return reduce(torch.add, of_weights.unflatten(-1, (-1, self.unit)).unbind(-1))

    def of_units(self, mask_OI: torch.Tensor) -> torch.Tensor:
        """(..., U): the value of every unit of a mask (..., I).

        Raises:
            ValueError: the weights of a unit differ, or there is no whole number of units.
        """
        if self.unit == 1:
            return mask_OI
        if mask_OI.shape[-1] % self.unit:
            raise ValueError(f"the mask is not {self}")
        first, *others = mask_OI.unflatten(-1, (-1, self.unit)).unbind(-1)
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(f"the mask is not {self}")
        return first.contiguous()

    # sizes

    @property
    def density(self) -> float:
        """Share of weights kept, n / m."""
        return self.n / self.m

    @property
    def num_candidates(self) -> int:
        """C = binomial(m / unit, n / unit)."""
        return math.comb(self.units.m, self.units.n)

    @cached_property
    def kept_positions(self) -> list[tuple[int, ...]]:
        """Kept units of every candidate, in candidate order.

        Raises:
            ConfigError: more than MAX_CANDIDATES candidates.
        """
        if self.num_candidates > MAX_CANDIDATES:
            limit = (
                f"categorical logits take at most {MAX_CANDIDATES} candidates a group, "
                f"this pattern has {self.num_candidates:,}"
            )
            raise ConfigError(
                "pattern",
                str(self),
                limit,
                "Set learn.method=subset: a logit per weight or pair, M up to 32.",
            )
        return list(itertools.combinations(range(self.units.m), self.units.n))

    def candidates(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The legal 0/1 vectors, (C, M), in ``itertools.combinations`` order of the kept units.

        Raises:
            ConfigError: more than MAX_CANDIDATES candidates.
        """
        table = torch.zeros(self.num_candidates, self.units.m, dtype=dtype, device=device)
        for row, kept in enumerate(self.kept_positions):
            table[row, list(kept)] = 1
        return self.expand(table)

    def groups(self, in_features: int, what: str = "in_features", tp: int = 1) -> int:
        """Groups in a row of ``in_features`` weights held by one rank.

        Raises:
            ConfigError: m does not divide the row.
        """
        if in_features % self.m:
            raise ConfigError(
                "pattern",
                str(self),
                f"M must divide {what}, here {in_features}"
                + (f" after splitting over parallel.tp={tp}" if tp > 1 else ""),
                "Choose another pattern, for this layer alone with pattern_overrides, a smaller "
                "parallel.tp, or keep that layer dense with model.exclude.",
            )
        return in_features // self.m

    def already_fits(self, weight_OI: torch.Tensor) -> bool:
        """Whether the weight is pruned already: every group holds at least m - n exact zeros, in
        whole units.
        """
        if weight_OI.shape[-1] % self.m:
            return False
        kept_GU = self.sum_of_units(weight_OI != 0).unflatten(-1, (-1, self.units.m))
        return bool((kept_GU.sum(-1) <= self.units.n).all())

    def index_of(self, mask_OI: torch.Tensor) -> torch.Tensor:
        """Candidate index of every group, (..., G) int64, of a valid mask (..., I).

        Raises:
            ValueError: some group does not keep exactly n.
        """
        index = self.index_of_bits(self.bits_of(mask_OI).cpu())
        return torch.from_numpy(index.astype(np.int64)).to(mask_OI.device)

    def bits_dtype(self) -> torch.dtype:
        """The smallest integer with a bit for every unit of a group."""
        for bits, dtype in ((8, torch.uint8), (16, torch.int16), (32, torch.int32)):
            if self.units.m <= bits:
                return dtype
        return torch.int64

    def bits_of(self, mask_OI: torch.Tensor) -> torch.Tensor:
        """Every group of a mask (..., I) as a number, (..., G): bit j says that unit j is kept.

        Raises:
            ValueError: the mask holds something else than 0 and 1, no whole number of groups, or
                a unit of which a part is kept.
        """
        if self.unit > 1:
            return self.units.bits_of(self.of_units(mask_OI))
        is_mask = mask_OI.dtype == torch.bool or bool(((mask_OI == 0) | (mask_OI == 1)).all())
        if not is_mask or mask_OI.shape[-1] % self.m:
            raise ValueError(f"the mask is not {self}")
        groups = mask_OI.bool().unflatten(-1, (-1, self.m))
        bits = torch.zeros(groups.shape[:-1], dtype=self.bits_dtype(), device=mask_OI.device)
        for position in range(self.m):
            bits |= groups[..., position].to(bits.dtype) << position
        return bits

    def index_of_bits(self, bits_G: torch.Tensor) -> Numbers:
        """Candidate index of the groups in ``bits_of``, of any shape, on the CPU.

        Raises:
            ValueError: some group does not keep exactly n.
        """
        if self.unit > 1:
            return self.units.index_of_bits(bits_G)
        bits = bits_G.numpy()
        bits = bits.view(f"u{bits.itemsize}")
        index: Numbers
        if self.m <= 8 and bits.size % 2 == 0 and bits.flags.c_contiguous:
            two = look_up(self._pair_table, bits.reshape(-1).view(np.uint16))
            index = two.view(np.uint8).reshape(bits.shape)
        elif self.m <= TABLE_BITS:
            index = look_up(self._index_table, bits)
        else:
            index = self._index_by_bytes(bits)
        if index.size and index.max() == self.num_candidates:
            raise ValueError(f"the mask is not {self}")
        return index

    @cached_property
    def _index_table(self) -> Numbers:
        """``_index_by_bytes`` of every number that ``bits_of`` could return."""
        bits = np.arange(2**8 if self.m <= 8 else 2**16, dtype=np.uint64)
        return self._index_by_bytes(bits).astype(smallest_dtype(self.num_candidates))

    @cached_property
    def _pair_table(self) -> npt.NDArray[np.uint16]:
        """Two candidate indices of a byte each, by two numbers of ``bits_of`` of a byte each: a
        look-up for two groups.
        """
        both = np.arange(2**16, dtype=np.uint16).view(np.uint8)
        return self._index_table[both].view(np.uint16)

    def _index_by_bytes(self, bits: Numbers) -> npt.NDArray[np.uint64]:
        """Candidate index, or the number of candidates where not exactly n bits are set."""
        bits = bits.astype(np.uint64)
        above, left = np.zeros(bits.shape, dtype=np.uint64), np.full(bits.shape, self.n)
        for number, (shares, ones) in enumerate(self._byte_tables):
            byte = (bits >> np.uint64(8 * number)) & np.uint64(255)
            above += shares[np.maximum(left, 0), byte]
            left -= ones[byte]
        outside = bits >> np.uint64(self.m) if self.m < 64 else np.zeros_like(bits)
        index: npt.NDArray[np.uint64] = np.uint64(self.num_candidates - 1) - above
        index[(left != 0) | (outside != 0)] = self.num_candidates
        return index

    @cached_property
    def _byte_tables(self) -> list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]]:
        """For every 8 positions: the share of a byte in the candidates after a candidate, by how
        many positions are kept from there on and by the byte, (n + 1, 256); and its number of ones.
        """
        choose, tables = self._choose(torch.device("cpu")).numpy().astype(np.uint64), []
        byte = np.arange(256)
        for first in range(0, self.m, 8):
            shares = np.zeros((self.n + 1, 256), dtype=np.uint64)
            ones = np.zeros(256, dtype=np.int64)
            for bit, position in enumerate(range(first, min(first + 8, self.m))):
                is_kept = (byte >> bit & 1).astype(bool)
                left = np.arange(self.n + 1)[:, None] - ones  # from this position on
                shares += np.where(is_kept, choose[position][np.maximum(left, 0)], np.uint64(0))
                ones += is_kept
            tables.append((shares, ones))
        return tables

    def mask_of(self, index_OG: torch.Tensor, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """Mask (..., I) of candidate indices (..., G) of any integer dtype."""
        if index_OG.device.type == "cpu" and self._masks is not None:
            return torch.from_numpy(self._masks.masks(index_OG.numpy())).to(dtype)
        if self.unit > 1:
            return self.expand(self.units.mask_of(index_OG, dtype))
        if self.num_candidates <= MAX_CANDIDATES:
            return self.candidates(dtype, index_OG.device)[index_OG.long()].flatten(-2)
        above, positions = self.num_candidates - 1 - index_OG.long(), []
        left = torch.full_like(above, self.n)
        for choose in self._choose(index_OG.device):
            share = choose[left]
            positions.append(share <= above)
            above, left = (
                torch.where(positions[-1], above - share, above),
                left - positions[-1].long(),
            )
        return torch.stack(positions, -1).to(dtype).flatten(-2)

    @cached_property
    def _masks(self) -> MaskTable | None:
        """The masks of all candidates; None where they are too many for a table."""
        if self.num_candidates <= MAX_CANDIDATES:
            return MaskTable(self.candidates(torch.bool).numpy())
        if self.m > TABLE_BITS or self.unit > 1:
            return None
        bits = np.flatnonzero(self._index_table < self.num_candidates)
        masks = np.zeros((self.num_candidates, self.m), dtype=bool)
        masks[self._index_table[bits]] = bits[:, None] >> np.arange(self.m) & 1
        return MaskTable(masks)

    def _choose(self, device: torch.device) -> torch.Tensor:
        """binomial(m - 1 - j, k) for every position j and k <= n, (M, n + 1) int64.

        A candidate stands before the last one by the sum, over its kept positions j, of binomial(m
        - 1 - j, kept from j on): the combinatorial number system, whose digits are found greedily.
        """
        table = [[math.comb(self.m - 1 - j, k) for k in range(self.n + 1)] for j in range(self.m)]
        return torch.tensor(table, dtype=torch.int64, device=device)

    def best(self, score_OI: torch.Tensor) -> torch.Tensor:
        """Bool mask that keeps the n largest scores of every group; ties go to the earlier
        position. The score of a unit is the sum of the scores of its weights.
        """
        if self.unit > 1:
            return self.expand(self.units.best(self.sum_of_units(score_OI)))
        return best_of_groups(score_OI, self.n, self.m)
